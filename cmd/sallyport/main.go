// SPDX-License-Identifier: Apache-2.0

// Command sallyport is the one binary: the agent, its unprivileged half, the
// authority, and the operator's verbs.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set at link time.
var version = "unknown"

// errSilent ends a command with exit status 1 whose output has said why.
var errSilent = errors.New("")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // a second signal ends what does not listen to the first
	code := execute(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// execute runs one command line and returns its exit status.
func execute(ctx context.Context, args []string, out, errOut io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(errOut)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	if !errors.Is(err, errSilent) {
		fmt.Fprintln(errOut, "sallyport:", err)
	}
	return 1
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "sallyport",
		Short:         "Zero trust for APIs, from the kernel up",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.CompletionOptions.HiddenDefaultCmd = false
	root.AddCommand(
		newAgent(), newUserspace(), newAuthority(), newDemo(),
		newCheck(), newStatus(), newObserve(), newExplain(),
		newPolicy(), newIdentity(), newRelation(), newRevoke(), newVersion(),
	)
	nouns(root)
	return root
}

// nouns has every command that only groups others show them, and refuse what
// is none of them: cobra itself does so for the root alone.
func nouns(c *cobra.Command) {
	for _, sub := range c.Commands() {
		nouns(sub)
		if sub.HasSubCommands() && !sub.Runnable() {
			sub.Args = cobra.NoArgs
			sub.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
		}
	}
}

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		Run: func(c *cobra.Command, _ []string) { fmt.Fprintln(c.OutOrStdout(), version) },
	}
}
