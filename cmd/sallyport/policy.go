// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/agent/config"
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
)

func newPolicy() *cobra.Command {
	c := &cobra.Command{Use: "policy", Short: "Work with policy files"}
	c.AddCommand(newValidate(), newPolicyNew(), newPolicyTest(), newPolicySchema(), newPolicyExplain(), newPolicyDiff())
	return c
}

// problemJSON is one problem as -o json writes it.
type problemJSON struct {
	File     string `json:"file"`
	Line     int    `json:"line"`
	Column   int    `json:"column"`
	Severity string `json:"severity"`
	Message  string `json:"message"`
	// Suggestion is what to write in place of the wrong name.
	Suggestion string `json:"suggestion,omitempty"`
}

func newValidate() *cobra.Command {
	defaults := config.Defaults("node")
	c := &cobra.Command{
		Use: "validate [DIR|FILE|-...]", Short: "Check policies by the agent's own code, all problems at once; exit 1 if one is an error",
		Long: "Check policies by the agent's own code, all problems at once; exit 1 if one is an error.\nWithout an argument: " + defaults.PolicyDir + "; - is standard input.",
	}
	out := addFormat(c)
	trustDomain := c.Flags().String("trust-domain", defaults.TrustDomain, "trust domain that IDs must be of")
	node := c.Flags().String("node", defaults.Node, "node name in derived IDs")
	file := c.Flags().String("config", "", "configuration file of an agent: for its trust domain, node and bundles (default: any bundles)")
	tenant := c.Flags().String("tenant", "", "hold the documents to what a tenant of the cluster with this namespace may say")
	contexts := c.Flags().StringSlice("context", nil, "with --tenant: a directory or file with what else the cluster has")
	hosts := c.Flags().StringSlice("allow-url-host", nil, "with --tenant: a host that URLs may name, HOST or HOST:PORT")
	c.RunE = func(c *cobra.Command, args []string) error {
		if len(args) == 0 {
			args = []string{defaults.PolicyDir}
		}
		if *tenant == "" && (len(*contexts) > 0 || len(*hosts) > 0) {
			return errors.New("--context and --allow-url-host go with --tenant")
		}
		// Of several folders the files' names must say which they are of.
		files, problems, err := readPolicies(c.InOrStdin(), args, len(args)+len(*contexts) > 1)
		if err != nil {
			return err
		}
		opt := compile.Options{TrustDomain: *trustDomain, Node: *node}
		if *file != "" {
			cfg, err := loadConfig(*file, nil)
			if err != nil {
				return err
			}
			if !c.Flags().Changed("trust-domain") {
				opt.TrustDomain = cfg.TrustDomain
			}
			if !c.Flags().Changed("node") {
				opt.Node = cfg.Node
			}
			opt.Domains = cfg.Identity.Domains()
		}
		if *tenant != "" {
			known, more, err := readPolicies(c.InOrStdin(), *contexts, true)
			if err != nil {
				return err
			}
			foreign := make(map[string]bool, len(known))
			for _, f := range known {
				foreign[f.Path] = true
			}
			for _, p := range more { // of those that could not be read
				foreign[p.File] = foreign[p.File] || p.File != ""
			}
			files, problems = append(files, known...), append(problems, more...)
			opt.Tenant = &compile.Tenancy{Namespace: *tenant, Hosts: *hosts, Context: func(file string) bool { return foreign[file] }}
		}
		plan, built := compile.Build(files, opt)
		problems = opt.Tenant.Told(load.Sort(append(problems, built...)))
		if out.json {
			list := []problemJSON{}
			for _, p := range problems {
				list = append(list, problemJSON{p.File, p.Line, p.Column, p.Severity.String(), p.Message, p.Suggestion})
			}
			if err := writeJSON(c.OutOrStdout(), list); err != nil {
				return err
			}
		} else {
			for _, p := range problems {
				fmt.Fprintln(c.OutOrStdout(), plain(p.String()))
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

// readPolicies reads directories as the agent does, single files, and
// standard input, whose name is -. A file of a directory has its name there,
// or its whole path.
func readPolicies(stdin io.Reader, args []string, paths bool) (files []load.File, problems []load.Problem, err error) {
	for _, a := range args {
		if a == "-" {
			content, err := io.ReadAll(io.LimitReader(stdin, load.MaxFileBytes+1))
			if err != nil {
				return nil, nil, fmt.Errorf("read policies: %w", err)
			}
			files = append(files, load.File{Path: "-", Content: content})
			continue
		}
		info, err := os.Stat(a)
		if err != nil {
			return nil, nil, fmt.Errorf("read policies: %w", err)
		}
		if !info.IsDir() {
			if !info.Mode().IsRegular() {
				return nil, nil, fmt.Errorf("read policies: %s is not a regular file", a)
			}
			content, err := os.ReadFile(a)
			if err != nil {
				return nil, nil, fmt.Errorf("read policies: %w", err)
			}
			files = append(files, load.File{Path: filepath.Clean(a), Content: content})
			continue
		}
		found, p, err := load.ReadDir(a)
		if err != nil {
			return nil, nil, readError(a, err)
		}
		if paths {
			found, p = within(a, found), placed(a, p)
		}
		files, problems = append(files, found...), append(problems, p...)
	}
	return files, problems, nil
}
