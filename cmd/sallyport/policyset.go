// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/agent/config"
	"github.com/sallyport-dev/sallyport/agent/control"
	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// setFlags are what a set of policies depends on besides its documents.
type setFlags struct{ trustDomain, node *string }

func addSetFlags(c *cobra.Command) *setFlags {
	return &setFlags{
		trustDomain: c.Flags().String("trust-domain", "", "trust domain that IDs must be of (default: any)"),
		node:        c.Flags().String("node", config.Defaults("node").Node, "node name in derived IDs"),
	}
}

// readSet reads a policy folder as the agent does; the files' names begin
// with the folder's, so that they lead there.
func readSet(dir string) ([]load.File, []load.Problem, error) {
	files, problems, err := load.ReadDir(dir)
	return within(dir, files), placed(dir, problems), readError(dir, err)
}

func readError(dir string, err error) error {
	if err != nil {
		return fmt.Errorf("read policies in %s: %w", dir, err)
	}
	return nil
}

func within(dir string, files []load.File) []load.File {
	for i := range files {
		files[i].Path = filepath.Join(dir, files[i].Path)
	}
	return files
}

func placed(dir string, problems []load.Problem) []load.Problem {
	for i := range problems {
		if problems[i].File != "" {
			problems[i].File = filepath.Join(dir, problems[i].File)
		}
	}
	return problems
}

// running names the set that the agent has in force; a folder of that name is
// ./running.
const running = "running"

var errNoSet = errors.New("the agent has no policies in force yet")

// policySet is a set of policies, with what it is compiled for.
type policySet struct {
	name     string // folder, or running
	files    []load.File
	problems []load.Problem
	opt      compile.Options
	ceiling  flow.Mode // of the agent; enforce for a folder
}

// read reads a folder, or what the agent has in force.
func (s *setFlags) read(ctx context.Context, socket, name string) (*policySet, error) {
	if name != running {
		return s.folder(name)
	}
	set := &policySet{name: running}
	err := ask(ctx, socket, func(ctx context.Context, client *control.Client) error {
		status, err := client.Status(ctx, &controlpb.StatusRequest{})
		if err != nil {
			return err
		}
		reply, err := client.Policies(ctx, &controlpb.PoliciesRequest{Files: true})
		if err != nil {
			return err
		}
		if reply.GetSet().GetDigest() == "" {
			return errNoSet
		}
		for _, f := range reply.GetFiles() {
			set.files = append(set.files, load.File{Path: f.GetPath(), Content: f.GetContent()})
		}
		set.opt = compile.Options{TrustDomain: status.GetTrustDomain(), Node: status.GetNode()}
		var ok bool
		if set.ceiling, ok = flow.ParseMode(status.GetModeCeiling()); !ok {
			return fmt.Errorf("read status: no mode %q", status.GetModeCeiling())
		}
		return nil
	})
	return set, err
}

// folder reads a folder.
func (s *setFlags) folder(dir string) (*policySet, error) {
	files, problems, err := readSet(dir)
	return &policySet{dir, files, problems, compile.Options{TrustDomain: *s.trustDomain, Node: *s.node}, flow.ModeEnforce}, err
}

// build compiles the set; where it is not valid it writes what is wrong to w.
func (s *policySet) build(w io.Writer) (*compile.Plan, error) {
	plan, built := compile.Build(s.files, s.opt)
	problems := load.Sort(append(s.problems, built...))
	if plan != nil && !load.HasErrors(problems) {
		return plan, nil
	}
	for _, p := range problems {
		if p.Severity == load.Error {
			fmt.Fprintln(w, plain(p.String()))
		}
	}
	return nil, errSilent
}
