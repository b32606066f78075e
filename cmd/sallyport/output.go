// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/agent/config"
	"github.com/sallyport-dev/sallyport/agent/control"
)

// format is the value of -o.
type format struct{ json bool }

func addFormat(c *cobra.Command) *format {
	f := &format{}
	c.Flags().VarP(f, "output", "o", "text or json")
	return f
}

// Set implements pflag.Value.
func (f *format) Set(s string) error {
	if s != "text" && s != "json" {
		return fmt.Errorf("%q is not one of text, json", s)
	}
	f.json = s == "json"
	return nil
}

// String implements pflag.Value.
func (f *format) String() string {
	if f.json {
		return "json"
	}
	return "text"
}

// Type implements pflag.Value.
func (f *format) Type() string { return "format" }

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// table writes aligned columns.
func table(w io.Writer, rows func(row func(cells ...any))) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	rows(func(cells ...any) {
		for i, c := range cells {
			if i > 0 {
				fmt.Fprint(t, "\t")
			}
			fmt.Fprint(t, c)
		}
		fmt.Fprintln(t)
	})
	return t.Flush()
}

// addSocket adds the flag for the agent's control socket.
func addSocket(c *cobra.Command) *string {
	return c.PersistentFlags().String("control-socket", defaultSocket(), "the agent's control socket")
}

// ask runs f with a client of the agent.
func ask(ctx context.Context, socket string, f func(context.Context, *control.Client) error) error {
	client, err := control.Dial(ctx, socket)
	if err != nil {
		return err
	}
	defer client.Close() //nolint:errcheck // nothing to be done about it
	err = f(ctx, client)
	if err == nil || errors.Is(err, errSilent) {
		return err
	}
	return errors.New(control.Text(err))
}

// when writes a time of the control API for a person.
func when(ns int64) string {
	if ns == 0 {
		return "never"
	}
	return time.Unix(0, ns).UTC().Format(time.RFC3339)
}

// orDash is what stands in a column that has nothing to say.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// defaultSocket is where an agent listens that was not told otherwise.
func defaultSocket() string {
	if s := os.Getenv("SALLYPORT_CONTROL_SOCKET"); s != "" {
		return s
	}
	return config.Defaults("").ControlSocket
}
