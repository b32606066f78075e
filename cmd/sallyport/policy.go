// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/agent/config"
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
)

func newPolicy() *cobra.Command {
	c := &cobra.Command{Use: "policy", Short: "Work with policy files"}
	c.AddCommand(newValidate())
	return c
}

// problemJSON is one problem as -o json writes it.
type problemJSON struct {
	File     string `json:"file"`
	Line     int    `json:"line"`
	Column   int    `json:"column"`
	Severity string `json:"severity"`
	Message  string `json:"message"`
}

func newValidate() *cobra.Command {
	defaults := config.Defaults("node")
	c := &cobra.Command{
		Use: "validate [DIR|FILE...]", Short: "Check policies by the agent's own code, all problems at once; exit 1 if one is an error",
		Long: "Check policies by the agent's own code, all problems at once; exit 1 if one is an error.\nWithout an argument: " + defaults.PolicyDir + ".",
	}
	out := addFormat(c)
	trustDomain := c.Flags().String("trust-domain", defaults.TrustDomain, "trust domain that IDs must be of")
	node := c.Flags().String("node", defaults.Node, "node name in derived IDs")
	c.RunE = func(c *cobra.Command, args []string) error {
		if len(args) == 0 {
			args = []string{defaults.PolicyDir}
		}
		files, problems, err := readPolicies(args)
		if err != nil {
			return err
		}
		plan, built := compile.Build(files, compile.Options{TrustDomain: *trustDomain, Node: *node})
		problems = load.Sort(append(problems, built...))
		if out.json {
			list := []problemJSON{}
			for _, p := range problems {
				list = append(list, problemJSON{p.File, p.Line, p.Column, p.Severity.String(), p.Message})
			}
			if err := writeJSON(c.OutOrStdout(), list); err != nil {
				return err
			}
		} else {
			for _, p := range problems {
				fmt.Fprintln(c.OutOrStdout(), p)
			}
		}
		if plan == nil || load.HasErrors(problems) {
			return errSilent
		}
		if !out.json {
			fmt.Fprintf(c.OutOrStdout(), "%d files, %d identities, %d policies: valid\n", len(files), len(plan.Identities()), len(plan.APIs()))
		}
		return nil
	}
	return c
}

// readPolicies reads directories as the agent does, and single files.
func readPolicies(args []string) (files []load.File, problems []load.Problem, err error) {
	for _, a := range args {
		info, err := os.Stat(a)
		if err != nil {
			return nil, nil, fmt.Errorf("read policies: %w", err)
		}
		if !info.IsDir() {
			content, err := os.ReadFile(a)
			if err != nil {
				return nil, nil, fmt.Errorf("read policies: %w", err)
			}
			files = append(files, load.File{Path: filepath.Clean(a), Content: content})
			continue
		}
		found, p, err := load.ReadDir(a)
		if err != nil {
			return nil, nil, fmt.Errorf("read policies: %w", err)
		}
		files, problems = append(files, found...), append(problems, p...)
	}
	return files, problems, nil
}
