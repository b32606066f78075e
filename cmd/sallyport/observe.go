// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/agent/control"
	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
)

func newObserve() *cobra.Command {
	c := &cobra.Command{
		Use: "observe", Short: "Show decisions, samples and kernel events, live or the latest", Args: cobra.NoArgs,
		Example: `  sallyport observe -f --to shop/payments --decision deny
  sallyport observe --last 50 -o json`,
	}
	socket := addSocket(c)
	out := addFormat(c)
	follow := c.Flags().BoolP("follow", "f", false, "go on with what comes")
	last := c.Flags().Uint32("last", 0, "how many of the latest")
	since := c.Flags().Duration("since", 0, "what happened in that time")
	not := c.Flags().Bool("not", false, "turn all filters round")
	fields := map[string]*[]string{}
	for flag, help := range map[string]string{
		"kind": "decision, sample or event", "from": "NAMESPACE/NAME or address of the caller", "to": "NAMESPACE/NAME or address",
		"decision": "allow, deny, wouldDeny, ...", "reason": "reason code", "stage": "stage that decided", "method": "HTTP method",
		"http-path": "path or template; a * at the end matches a prefix", "policy": "NAMESPACE/NAME",
	} {
		fields[flag] = c.Flags().StringSlice(flag, nil, help)
	}
	c.RunE = func(c *cobra.Command, _ []string) error {
		for _, k := range *fields["kind"] {
			if k != "decision" && k != "sample" && k != "event" {
				return fmt.Errorf("--kind: %q is not one of decision, sample, event", k)
			}
		}
		q := &controlpb.ObserveRequest{Follow: *follow, Last: *last}
		if *since > 0 {
			q.SinceUnixNs = time.Now().Add(-*since).UnixNano()
		}
		for flag, values := range fields {
			if len(*values) > 0 {
				q.Filters = append(q.Filters, &controlpb.Filter{Field: strings.TrimPrefix(flag, "http-"), Values: *values, Negate: *not})
			}
		}
		return ask(c.Context(), *socket, func(ctx context.Context, client *control.Client) error {
			stream, err := client.Observe(ctx, q)
			if err != nil {
				return err
			}
			for {
				o, err := stream.Recv()
				if errors.Is(err, io.EOF) || ctx.Err() != nil {
					return nil
				}
				if err != nil {
					return err
				}
				if o.GetLost() > 0 {
					fmt.Fprintf(c.ErrOrStderr(), "%d observations lost: this reader was too slow\n", o.GetLost())
				}
				writeObservation(c.OutOrStdout(), o, out.json)
			}
		})
	}
	return c
}

// writeObservation writes one line. What callers chose is quoted: it must not
// speak to the terminal.
func writeObservation(w io.Writer, o *controlpb.Observation, asJSON bool) {
	if asJSON {
		fmt.Fprintf(w, "{\"kind\":%q,\"record\":%s}\n", o.GetKind(), o.GetJson())
		return
	}
	what := o.GetMethod()
	if o.GetPath() != "" {
		what += " " + o.GetPath()
	}
	verdict := o.GetDecision()
	if o.GetReason() != "" {
		verdict += " " + o.GetStage() + "/" + o.GetReason()
	}
	fmt.Fprintf(w, "%s %-8s %s -> %s  %s  %s", time.Unix(0, o.GetTimeUnixNs()).UTC().Format("15:04:05.000"),
		o.GetKind(), plain(o.GetFrom()), plain(o.GetTo()), plain(what), plain(verdict))
	var r pipeline.Record
	if o.GetKind() != "sample" && json.Unmarshal(o.GetJson(), &r) == nil {
		if r.Policy != "" {
			fmt.Fprintf(w, "  by %s %s %s", r.Policy, plain(r.Rule), r.Position)
		} else if r.Position != "" {
			fmt.Fprintf(w, "  by %s", r.Position)
		}
		if r.RequestID != "" {
			fmt.Fprintf(w, "  %s", plain(r.RequestID))
		}
	}
	fmt.Fprintln(w)
}

// plain keeps control characters from the terminal.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || (0x80 <= r && r < 0xa0) {
			return '?'
		}
		return r
	}, s)
}
