// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/sallyport-dev/sallyport/agent/control"
	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/userspace"
)

func newStatus() *cobra.Command {
	c := &cobra.Command{
		Use: "status", Short: "Show the agent's state on one screen; exit 1 if it is unhealthy", Args: cobra.NoArgs,
	}
	socket := addSocket(c)
	out := addFormat(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		var s *controlpb.StatusReply
		err := ask(c.Context(), *socket, func(ctx context.Context, client *control.Client) (err error) {
			s, err = client.Status(ctx, &controlpb.StatusRequest{})
			return err
		})
		if err != nil {
			return err
		}
		if out.json {
			err = statusJSON(c.OutOrStdout(), s)
		} else {
			err = statusText(c.OutOrStdout(), s)
		}
		if err == nil && !s.GetReady() {
			return errSilent
		}
		return err
	}
	return c
}

// statusJSON writes the reply with what userspace said of itself in place.
func statusJSON(w io.Writer, s *controlpb.StatusReply) error {
	inner := s.GetUserspace().GetJson()
	if s.Userspace != nil {
		s.Userspace.Json = nil
	}
	raw, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(s)
	if err != nil {
		return fmt.Errorf("encode status: %w", err)
	}
	var m map[string]any
	if err := json.Unmarshal(raw, &m); err != nil {
		return fmt.Errorf("encode status: %w", err)
	}
	if len(inner) > 0 {
		m["proxy"] = json.RawMessage(inner)
	}
	return writeJSON(w, m)
}

func statusText(w io.Writer, s *controlpb.StatusReply) error {
	state := "healthy"
	if !s.GetReady() {
		state = "UNHEALTHY"
	}
	fmt.Fprintf(w, "%s  node %s  trust domain %s  version %s  kernel %s\n", state, s.GetNode(), s.GetTrustDomain(), s.GetVersion(), s.GetKernel())
	fmt.Fprintf(w, "identity anchor: %s", s.GetAnchor())
	if s.GetAnchor() == "software" {
		fmt.Fprint(w, "  (no TPM: whoever copies the key files can be this node)")
	}
	fmt.Fprintln(w)
	if s.GetModeCeiling() != "enforce" {
		fmt.Fprintf(w, "MODE CEILING %s: no policy of this node is stricter than that\n", strings.ToUpper(s.GetModeCeiling()))
	}
	set := s.GetPolicySet()
	fmt.Fprintf(w, "policies: generation %d, in force since %s", set.GetGeneration(), when(set.GetLoadedUnixNs()))
	if set.GetLastGood() {
		fmt.Fprint(w, "  (the last good set: the directory is refused)")
	}
	fmt.Fprintln(w)
	for _, e := range set.GetErrors() {
		fmt.Fprintln(w, "  refused:", e)
	}
	for _, warning := range set.GetWarnings() {
		fmt.Fprintln(w, " ", warning)
	}
	for _, p := range s.GetProblems() {
		fmt.Fprintf(w, "%s: %s\n  what to do: %s\n", p.GetSeverity(), p.GetText(), p.GetRemedy())
	}
	for _, f := range s.GetFeatures() {
		fmt.Fprintln(w, "lost on this kernel:", f.GetLost())
	}
	fmt.Fprintln(w)
	err := table(w, func(row func(...any)) {
		row("KIND", "NAME", "MODE", "EFFECTIVE", "PROTECTS", "AT")
		for _, p := range s.GetPolicies() {
			row(p.GetKind(), p.GetName(), p.GetMode(), p.GetEffectiveMode(), orDash(p.GetProtects()), p.GetPosition())
		}
	})
	if err != nil {
		return err
	}
	fmt.Fprintln(w)
	err = table(w, func(row func(...any)) {
		row("WORKLOAD", "IDENTITY", "BY", "PROCESSES", "MODE")
		for _, l := range s.GetWorkloads() {
			name := l.GetIdentity()
			if len(l.GetAmbiguous()) > 0 {
				name = "ambiguous: " + strings.Join(l.GetAmbiguous(), ", ")
			}
			mode := orDash(l.GetMode())
			if l.GetUnconfined() {
				mode += ", unconfined"
			}
			row(l.GetCgroup(), orDash(name), orDash(l.GetRecognisedBy()), l.GetProcesses(), mode)
		}
	})
	if err != nil {
		return err
	}
	return statusCounts(w, s)
}

func statusCounts(w io.Writer, s *controlpb.StatusReply) error {
	fmt.Fprintln(w)
	fmt.Fprint(w, "kernel:")
	for _, c := range s.GetCounters() {
		if c.GetValue() > 0 {
			fmt.Fprintf(w, " %s=%d", c.GetName(), c.GetValue())
		}
	}
	fmt.Fprintln(w)
	u := s.GetUserspace()
	if !u.GetReady() {
		fmt.Fprintln(w, "userspace: not answering")
		return nil
	}
	var st userspace.Status
	if err := json.Unmarshal(u.GetJson(), &st); err != nil {
		return fmt.Errorf("read userspace's status: %w", err)
	}
	fmt.Fprintf(w, "userspace: pid %d since %s, %d restarts, %d connections, %d MiB\n",
		u.GetPid(), when(u.GetStartedUnixNs()), u.GetRestarts(), st.Engine.Conns, st.Resident>>20)
	fmt.Fprint(w, "decisions:")
	for _, d := range st.Decisions {
		name := d.Effect
		if d.Reason != "" {
			name = d.Stage + "/" + d.Reason
		}
		if d.Effect != "allow" && !d.Enforced {
			name = "would-deny:" + name
		}
		fmt.Fprintf(w, " %s=%d", name, d.Count)
	}
	fmt.Fprintln(w)
	if s.GetRevocations() > 0 {
		fmt.Fprintf(w, "revocations in force: %d\n", s.GetRevocations())
	}
	return nil
}
