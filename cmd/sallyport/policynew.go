// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/policies/library"
	"github.com/sallyport-dev/sallyport/policies/load"
)

func newPolicyNew() *cobra.Command {
	return &cobra.Command{
		Use: "new [EXAMPLE [DIR]]", Short: "Write an example set of policies, with its tests, to start from", Args: cobra.MaximumNArgs(2),
		Long: "Write an example set of policies, with its tests and a page that says what to change, into DIR, by default a\n" +
			"folder of the example's name. A file that is there is never overwritten. Without an argument: the examples.",
		ValidArgs: library.Names(),
		RunE: func(c *cobra.Command, args []string) error {
			w := c.OutOrStdout()
			if len(args) == 0 {
				return table(w, func(row func(...any)) {
					for _, name := range library.Names() {
						row(name, library.Summary(name))
					}
				})
			}
			files, err := library.Files(args[0])
			if errors.Is(err, fs.ErrNotExist) || strings.ContainsAny(args[0], "/.") {
				return fmt.Errorf("no example %q%s; there are %s", args[0], load.DidYouMean(args[0], library.Names(), `"`), strings.Join(library.Names(), ", "))
			}
			if err != nil {
				return err
			}
			dir := args[len(args)-1]
			if err := writeExample(dir, files); err != nil {
				return err
			}
			for _, f := range files {
				fmt.Fprintln(w, filepath.Join(dir, f.Path))
			}
			fmt.Fprintf(w, "\nread %s, change what it says, then: sallyport policy test %s\n", filepath.Join(dir, "README.md"), dir)
			return nil
		},
	}
}

// writeExample writes all files or, where one is there already, none.
func writeExample(dir string, files []load.File) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write example: %w", err)
	}
	for _, f := range files {
		if _, err := os.Lstat(filepath.Join(dir, f.Path)); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("write example: %s is there already", filepath.Join(dir, f.Path))
		}
	}
	for _, f := range files {
		out, err := os.OpenFile(filepath.Join(dir, f.Path), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if err != nil {
			return fmt.Errorf("write example: %w", err)
		}
		_, err = out.Write(f.Content)
		if err := errors.Join(err, out.Close()); err != nil {
			return fmt.Errorf("write example: %w", err)
		}
	}
	return nil
}
