// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/agent/preflight"
)

func newCheck() *cobra.Command {
	c := &cobra.Command{
		Use: "check", Short: "Try what this machine can do; exit 1 if the agent cannot run", Args: cobra.NoArgs,
	}
	root := c.Flags().String("cgroup-root", "", "cgroup2 directory to try in (default: the root of the hierarchy)")
	out := addFormat(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		if os.Geteuid() != 0 {
			return fmt.Errorf("check: %w", errNotRoot)
		}
		checks := preflight.Run(*root)
		if out.json {
			if err := writeJSON(c.OutOrStdout(), checks); err != nil {
				return err
			}
		} else if err := checkText(c, checks); err != nil {
			return err
		}
		if err := preflight.Missing(checks); err != nil {
			if !out.json {
				fmt.Fprintf(c.OutOrStdout(), "\nthe agent cannot run here:\n%v\n", err)
			}
			return errSilent
		}
		return nil
	}
	return c
}

func checkText(c *cobra.Command, checks []preflight.Check) error {
	return table(c.OutOrStdout(), func(row func(...any)) {
		row("", "FEATURE", "NEEDS", "WITHOUT IT")
		for _, k := range checks {
			mark := "have"
			lost := ""
			if !k.Have {
				mark, lost = "missing", k.Lost
				if k.Required {
					mark = "MISSING"
				}
				if k.Detail != "" {
					lost += " (" + k.Detail + ")"
				}
			}
			row(mark, k.Name, k.Needs, lost)
		}
	})
}
