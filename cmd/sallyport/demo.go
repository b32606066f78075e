// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/cmd/sallyport/internal/demo"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func newDemo() *cobra.Command {
	c := &cobra.Command{
		Use: "demo", Short: "Run two nodes on this machine, with real processes and real traffic, and judge every case", Args: cobra.NoArgs,
		Long: `Run two nodes in network namespaces of this machine, each with its own agent,
cgroup subtree and processes, and real HTTP over real sockets. Each line is one
case: what was tried, what was expected, what came, and where it was decided.
Everything is removed again at the end, also after Ctrl-C.`,
	}
	out := addFormat(c)
	ceiling := c.Flags().String("mode-ceiling", "enforce", "strictest mode of any policy; observe makes every refusal fail, which proves that the demo can")
	keep := c.Flags().Bool("keep-logs", false, "print where the agents' logs are and leave them there")
	c.RunE = func(c *cobra.Command, _ []string) error {
		mode, ok := flow.ParseMode(*ceiling)
		if !ok {
			return fmt.Errorf("--mode-ceiling: %q is not one of observe, audit, enforce", *ceiling)
		}
		if os.Geteuid() != 0 {
			return fmt.Errorf("run demo: %w", errNotRoot)
		}
		passed, err := demo.Run(c.Context(), demo.Options{Out: c.OutOrStdout(), JSON: out.json, Ceiling: mode, KeepLogs: *keep})
		if err != nil {
			return fmt.Errorf("run demo: %w", err)
		}
		if !passed {
			return errSilent
		}
		return nil
	}
	c.AddCommand(
		&cobra.Command{
			Use: "application", Hidden: true, Args: cobra.NoArgs,
			RunE: func(*cobra.Command, []string) error { return demo.AppMain() },
		},
		&cobra.Command{
			Use: "rogue", Hidden: true, Args: cobra.NoArgs,
			RunE: func(c *cobra.Command, _ []string) error {
				return demo.Rogue{}.Run(c.Context(), os.Stdin, c.OutOrStdout())
			},
		},
	)
	return c
}
