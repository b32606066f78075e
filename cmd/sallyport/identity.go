// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/agent/control"
	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/userspace"
)

// identityJSON is one identity as `identity list -o json` writes it.
type identityJSON struct {
	Name       string      `json:"name"`
	ID         string      `json:"id"`
	Number     uint32      `json:"number"`
	Owner      string      `json:"owner"`
	Expires    string      `json:"expires"`
	Selector   string      `json:"selector,omitempty"`
	Endpoints  []string    `json:"endpoints,omitempty"`
	MayCall    []string    `json:"mayCall,omitempty"`
	Mode       string      `json:"mode"`
	Position   string      `json:"position"`
	Cgroups    []string    `json:"cgroups,omitempty"`
	Thumbprint string      `json:"thumbprint,omitempty"` // of its certificate: SHA-256, hex
	Serial     string      `json:"serial,omitempty"`
	NotAfter   string      `json:"notAfter,omitempty"`
	Problem    string      `json:"problem,omitempty"`
	Tokens     []heldToken `json:"tokens,omitempty"`
}

// heldToken is a token that is obtained for an identity's calls to another.
type heldToken struct {
	To       string `json:"to"`
	Issuer   string `json:"issuer"`
	NotAfter string `json:"notAfter,omitempty"`
	Problem  string `json:"problem,omitempty"`
}

func newIdentity() *cobra.Command {
	c := &cobra.Command{Use: "identity", Short: "Show identities and workloads"}
	list := &cobra.Command{
		Use: "list", Short: "List identities, the workloads recognised as them, and the workloads that are nobody", Args: cobra.NoArgs,
	}
	socket := addSocket(list)
	out := addFormat(list)
	list.RunE = func(c *cobra.Command, _ []string) error {
		var r *controlpb.IdentitiesReply
		var st userspace.Status
		err := ask(c.Context(), *socket, func(ctx context.Context, client *control.Client) (err error) {
			if r, err = client.Identities(ctx, &controlpb.IdentitiesRequest{Unrecognised: true}); err != nil {
				return err
			}
			s, err := client.Status(ctx, &controlpb.StatusRequest{})
			if err != nil {
				return err
			}
			if raw := s.GetUserspace().GetJson(); len(raw) > 0 {
				return json.Unmarshal(raw, &st)
			}
			return nil
		})
		if err != nil {
			return err
		}
		ids := identities(r, &st)
		if out.json {
			return writeJSON(c.OutOrStdout(), ids)
		}
		w := c.OutOrStdout()
		err = table(w, func(row func(...any)) {
			row("IDENTITY", "ID", "OWNER", "EXPIRES", "MODE", "WORKLOADS", "CERTIFICATE UNTIL")
			for _, i := range ids {
				row(i.Name, i.ID, i.Owner, i.Expires, i.Mode, orDash(strings.Join(i.Cgroups, " ")), orDash(i.NotAfter+i.Problem))
			}
		})
		if err != nil {
			return err
		}
		if err := heldTokens(w, ids); err != nil {
			return err
		}
		return strangers(c, r)
	}
	c.AddCommand(list)
	return c
}

func identities(r *controlpb.IdentitiesReply, st *userspace.Status) []identityJSON {
	out := []identityJSON{}
	for _, i := range r.GetIdentities() {
		one := identityJSON{
			Name: i.GetName(), ID: i.GetSpiffeId(), Number: i.GetNumber(), Owner: i.GetOwner(), Expires: when(i.GetExpiresUnixNs()),
			Selector: i.GetSelector(), Endpoints: i.GetEndpoints(), MayCall: i.GetMayCall(), Mode: i.GetEffectiveMode(), Position: i.GetPosition(),
		}
		for _, w := range r.GetWorkloads() {
			if w.GetIdentity() == i.GetName() {
				one.Cgroups = append(one.Cgroups, w.GetCgroup())
			}
		}
		for _, l := range st.Leaves {
			if l.ID == i.GetSpiffeId() {
				one.Thumbprint, one.Serial, one.Problem = l.Thumbprint, l.Serial, l.Error
				if !l.NotAfter.IsZero() {
					one.NotAfter = l.NotAfter.UTC().Format("15:04:05Z")
				}
			}
		}
		for _, t := range st.Obtained {
			if t.ID != i.GetSpiffeId() {
				continue
			}
			held := heldToken{To: t.To, Issuer: t.Issuer, Problem: t.Error}
			if !t.Expires.IsZero() {
				held.NotAfter = t.Expires.UTC().Format("15:04:05Z")
			}
			one.Tokens = append(one.Tokens, held)
		}
		out = append(out, one)
	}
	return out
}

// heldTokens lists the tokens that are obtained for workloads.
func heldTokens(w io.Writer, ids []identityJSON) error {
	if !slices.ContainsFunc(ids, func(i identityJSON) bool { return len(i.Tokens) > 0 }) {
		return nil
	}
	fmt.Fprintln(w)
	return table(w, func(row func(...any)) {
		row("TOKEN FOR", "CALLS TO", "ISSUER", "UNTIL", "PROBLEM")
		for _, i := range ids {
			for _, t := range i.Tokens {
				row(i.Name, t.To, t.Issuer, orDash(t.NotAfter), orDash(t.Problem))
			}
		}
	})
}

// strangers lists the workloads that no identity claims, and what they lack.
func strangers(c *cobra.Command, r *controlpb.IdentitiesReply) error {
	var list []*controlpb.Workload
	for _, w := range r.GetWorkloads() {
		if w.GetIdentity() == "" {
			list = append(list, w)
		}
	}
	if len(list) == 0 {
		return nil
	}
	w := c.OutOrStdout()
	fmt.Fprintln(w)
	return table(w, func(row func(...any)) {
		row("WITHOUT IDENTITY", "PROCESSES", "NEAREST", "WHAT DOES NOT MATCH")
		for _, l := range list {
			nearest := l.GetNearest()
			if len(l.GetAmbiguous()) > 0 {
				nearest = strings.Join(l.GetAmbiguous(), ", ")
			}
			row(l.GetCgroup(), l.GetProcesses(), orDash(nearest), orDash(l.GetMismatch()))
		}
	})
}
