// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/agent/config"
	"github.com/sallyport-dev/sallyport/agent/control"
	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
	"github.com/sallyport-dev/sallyport/userspace/trial"
)

func newExplain() *cobra.Command {
	c := &cobra.Command{
		Use: "explain REQUEST-ID | explain --from CALLER --to CALLEE [METHOD PATH]", Short: "Show stage by stage what became of a recent call, or what would become of one",
		Long: `Show stage by stage what became of a recent call, by the request id of its denial or record, or what would
become of a described call, judged by policies in files and without an agent: --from and --to name
MachineIdentities; METHOD and PATH are those of a request, or grpc and PACKAGE.SERVICE/METHOD of a
call of gRPC; without them it is an opaque connection. The words of --token and --posture are those of
policy tests.`,
		Example: `  sallyport explain 01M8AJ2874XT3DJBBGGPD81C71
  sallyport explain --from checkout --to payments POST /v1/payments --token '{scopes: [payments:write]}'
  sallyport explain --from checkout --to ledger grpc shop.Ledger/Append
  sallyport explain --policies running --from none --to shop/payments GET /healthz`,
		Args: cobra.MaximumNArgs(2),
	}
	socket := addSocket(c)
	out := addFormat(c)
	e := &explainer{set: addSetFlags(c), policies: c.Flags().String("policies", config.Defaults("").PolicyDir, "folder with the policies, or running for those in force"), socket: socket, out: out}
	f := c.Flags()
	f.StringVar(&e.from, "from", "", "who calls: NAME, NAMESPACE/NAME, a SPIFFE ID, or none")
	f.StringVar(&e.to, "to", "", "who is called: NAME or NAMESPACE/NAME")
	f.Uint16Var(&e.port, "port", 0, "port that is called (default: the only one)")
	f.StringVar(&e.channel, "channel", "", "kernel, tunnel, tls or plaintext (default: tunnel; plaintext from none)")
	f.StringVar(&e.upgrade, "upgrade", "", "what the request asks to switch to: websocket")
	f.StringVar(&e.host, "host", "", "host that is asked for, or SNI")
	f.StringArrayVar(&e.headers, "header", nil, "field line, 'Name: value'")
	f.StringVar(&e.body, "body", "", "content")
	f.StringVar(&e.token, "token", "", "access token, as in '{scopes: [a:b], claims: {sub: alice}}'; {} for a plain one")
	f.StringVar(&e.posture, "posture", "", "what is known of node and program, as in '{node: {secureBoot: true}}'")
	f.StringArrayVar(&e.tuples, "tuple", nil, "relation that holds, 'USER RELATION OBJECT'")
	f.StringVar(&e.now, "now", "", "when, RFC 3339")
	c.RunE = func(c *cobra.Command, args []string) error {
		switch offline := e.from != "" || e.to != ""; {
		case offline && len(args) != 1:
			return e.run(c.Context(), c.OutOrStdout(), c.ErrOrStderr(), args)
		case offline:
			return errors.New("a described call has METHOD and PATH, or neither; a request id is explained alone")
		case len(args) != 1:
			return errors.New("name a request id, or describe a call with --from and --to")
		}
		for name := range e.flags() {
			if f.Changed(name) {
				return fmt.Errorf("--%s describes a call; a request id is explained alone", name)
			}
		}
		return explainLive(c.Context(), *socket, args[0], c.OutOrStdout(), out.json)
	}
	return c
}

func explainLive(ctx context.Context, socket, id string, w io.Writer, asJSON bool) error {
	return ask(ctx, socket, func(ctx context.Context, client *control.Client) error {
		r, err := client.Explain(ctx, &controlpb.ExplainRequest{RequestId: id})
		if err != nil {
			return err
		}
		var e pipeline.Explained
		if err := json.Unmarshal(r.GetJson(), &e); err != nil {
			return fmt.Errorf("read trace: %w", err)
		}
		if asJSON {
			return writeJSON(w, e)
		}
		return writeTrace(w, &e)
	})
}

func writeTrace(w io.Writer, e *pipeline.Explained) error {
	outcome := e.Decision
	if e.WouldDeny {
		outcome += " (let through: the policy is in " + e.Mode + ")"
	}
	fmt.Fprintf(w, "%s  %s\n", plain(e.RequestID), e.Time.UTC().Format(time.RFC3339Nano))
	fmt.Fprintf(w, "%s -> %s  %s %s\n", orDash(e.Source), orDash(e.Destination), plain(e.Method), plain(e.Path))
	fmt.Fprintf(w, "%s by stage %s, %s: %s\n", outcome, e.Stage, orDash(string(e.Reason)), plain(e.Detail))
	fmt.Fprintf(w, "policy %s, rule %s, %s; channel %s, anchor %s\n\n", orDash(e.Policy), orDash(e.Rule), orDash(e.Position), e.Channel, e.Anchor)
	if e.Reason != flow.ReasonOK {
		fmt.Fprintf(w, "what to do: %s%s%s\n\n", flow.ReasonsURL, plain(string(e.Reason)), flow.ReasonsSuffix)
	}
	return table(w, func(row func(...any)) {
		row("STAGE", "RULE", "FOUND", "DETAIL", "TOOK")
		for _, s := range e.Steps {
			found := string(s.Reason)
			if found == "" {
				found = "ok"
			}
			row(s.Stage, orDash(s.Rule), found, plain(s.Detail), time.Duration(s.TookNanos))
		}
	})
}

// explainer explains a call that is described by flags.
type explainer struct {
	set      *setFlags
	policies *string
	socket   *string
	out      *format

	from, to, channel, upgrade, host, body, token, posture, now string
	port                                                        uint16
	headers, tuples                                             []string
}

// flags are those that describe a call, as fields of a trial.Call written in
// YAML; "" for what is not given.
func (e *explainer) flags() map[string]string {
	quoted := func(s string) string {
		if s == "" {
			return ""
		}
		b, _ := json.Marshal(s) // a text always can; JSON's form is YAML's too
		return string(b)
	}
	list := func(items []string) string {
		if len(items) == 0 {
			return ""
		}
		b, _ := json.Marshal(items)
		return string(b)
	}
	m := map[string]string{
		"from": quoted(e.from), "to": quoted(e.to), "channel": quoted(e.channel), "upgrade": quoted(e.upgrade), "host": quoted(e.host), "header": list(e.headers),
		"body": quoted(e.body), "token": e.token, "posture": e.posture, "now": quoted(e.now), "port": "", "tuple": "",
	}
	if e.port != 0 {
		m["port"] = strconv.Itoa(int(e.port))
	}
	var tuples []map[string]string
	for _, t := range e.tuples {
		user, rest, _ := strings.Cut(t, " ")
		relation, object, _ := strings.Cut(rest, " ")
		tuples = append(tuples, map[string]string{"user": user, "relation": relation, "object": object})
	}
	if tuples != nil {
		b, _ := json.Marshal(tuples)
		m["tuple"] = string(b)
	}
	return m
}

// call reads the flags as strictly as a test file; what is wrong names its
// flag.
func (e *explainer) call(args []string) (*trial.Call, error) {
	flags := e.flags()
	if len(args) == 2 {
		field, what := "http", args[0]+" "+args[1]
		if strings.EqualFold(args[0], "grpc") {
			field, what = "grpc", args[1]
		}
		b, _ := json.Marshal(what)
		flags[field] = string(b)
	}
	var text strings.Builder
	var fields []string
	for _, name := range slices.Sorted(maps.Keys(flags)) {
		if flags[name] == "" {
			continue
		}
		if strings.ContainsAny(flags[name], "\r\n") {
			return nil, fmt.Errorf("--%s: write it in one line", name)
		}
		field := cmp.Or(map[string]string{"header": "headers", "tuple": "tuples"}[name], name)
		fmt.Fprintf(&text, "%s: %s\n", field, flags[name])
		fields = append(fields, field)
	}
	docs, problems := load.Documents[trial.Call](load.File{Path: "call", Content: []byte(text.String())}, "a call")
	switch {
	case len(problems) > 0 && 0 < problems[0].Line && problems[0].Line <= len(fields):
		field := fields[problems[0].Line-1]
		return nil, fmt.Errorf("%s: %s", flagName(field), strings.TrimPrefix(problems[0].Message, field+": "))
	case len(problems) > 0:
		return nil, errors.New(problems[0].Message)
	case len(docs) != 1:
		return nil, errors.New("one call can be described")
	}
	return &docs[0].Value, nil
}

// flagName is what a field of a call is on the command line.
func flagName(field string) string {
	switch field {
	case "http":
		return "METHOD PATH"
	case "grpc":
		return "grpc METHOD"
	case "headers":
		return "--header"
	case "tuples":
		return "--tuple"
	}
	return "--" + field
}

// explained is what -o json writes of a described call.
type explained struct {
	From    string   `json:"from"`
	To      string   `json:"to"`
	Port    uint16   `json:"port"`
	Call    string   `json:"call,omitempty"`
	Assumed []string `json:"assumed,omitempty"`
	Mode    string   `json:"mode,omitempty"`
	decided
	Near []compile.Miss `json:"near,omitempty"`
}

func (e *explainer) run(ctx context.Context, w, errOut io.Writer, args []string) error {
	call, err := e.call(args)
	if err != nil {
		return err
	}
	set, err := e.set.read(ctx, *e.socket, *e.policies)
	if err != nil {
		return err
	}
	plan, err := set.build(errOut)
	if err != nil {
		return err
	}
	t, err := trial.New(ctx, plan, time.Now())
	if err != nil {
		return err
	}
	defer t.Close()
	resolved, faults := t.Resolve(call)
	for _, f := range faults {
		_, message, _ := strings.Cut(f.Message, ": ")
		return fmt.Errorf("%s: %s", flagName(fmt.Sprint(f.Path[0])), message)
	}
	outcome, err := t.Judge(ctx, resolved)
	if err != nil {
		return err
	}
	x := explained{From: e.from, To: resolved.Target.FullName(), Port: resolved.Port, Call: strings.Join(args, " "), Assumed: resolved.Assumed, decided: decidedOf(&outcome)}
	if resolved.Source != nil {
		x.From = resolved.Source.FullName()
	}
	switch {
	case outcome.Leaving:
		x.Mode = resolved.Source.Mode.String()
	case resolved.API != nil:
		x.Mode = resolved.API.Mode.String()
		if r := outcome.Decision.Reason; r == flow.ReasonNoRule || r == flow.ReasonNoIdentity {
			x.Near = resolved.API.Near(resolved.Source, resolved.Call())
		}
	}
	if e.out.json {
		return writeJSON(w, x)
	}
	x.write(w, &outcome, set)
	return nil
}

func (x *explained) write(w io.Writer, o *trial.Outcome, set *policySet) {
	fmt.Fprintf(w, "%s -> %s:%d  %s\n", plain(x.From), x.To, x.Port, plain(x.Call))
	if len(x.Assumed) > 0 {
		fmt.Fprintf(w, "assumed: %s\n", plain(strings.Join(x.Assumed, "; ")))
	}
	fmt.Fprintln(w)
	writeDecided(w, "", o)
	if x.Decision != flow.EffectAllow.String() && !x.Refused {
		fmt.Fprintf(w, "\nlet through: %s is in mode %s\n", map[bool]string{true: "the caller", false: "the policy"}[x.Leaving], x.Mode)
	} else if x.Refused && set.ceiling < flow.ModeEnforce {
		fmt.Fprintf(w, "\nlet through: the agent's mode ceiling is %s\n", set.ceiling)
	}
	if len(x.Near) == 0 {
		return
	}
	fmt.Fprintln(w, "\nrules that do not speak of this call, the nearest first:")
	for _, m := range x.Near[:min(len(x.Near), maxListed)] {
		fmt.Fprintf(w, "  %s  %s\n", m.Rule, m.Position.FileLine())
		for _, d := range m.Differs {
			fmt.Fprintf(w, "      %s\n", plain(d))
		}
	}
	if more := len(x.Near) - maxListed; more > 0 {
		fmt.Fprintf(w, "  and %d more; -o json lists all\n", more)
	}
}
