// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// TestRecord reads back what is written, and finds nothing of the request's
// values in it.
func TestRecord(t *testing.T) {
	w := newWorld(t, "enforce")
	w.p.opt.Now = func() time.Time { return w.now }
	tok := w.token()
	r := w.request("GET /v1/payments/4711-secret?q=hunter2", bearer(tok))
	var d flow.Decision
	src := w.identity("checkout")
	w.p.Decide(w.env, r, src, w.api("payments"), &d)
	r.Upgrade = true // of a handshake, as the record tells it
	w.env.Loop.Record(r, w.api("payments"), &d, Outcome{Destination: w.identity("payments"), Took: 42 * time.Microsecond, BytesIn: 10, BytesOut: 20})
	denied := w.request("DELETE /v1/payments/4711-secret", bearer(tok))
	w.p.Decide(w.env, denied, src, w.api("payments"), &d)
	w.env.Loop.Record(denied, w.api("payments"), &d, Outcome{Destination: w.identity("payments"), Took: 7 * time.Millisecond})
	select {
	case <-w.p.Wake():
	default:
		t.Error("nobody was woken")
	}
	records, lost := w.p.TakeRecords(10)
	if len(records) != 2 || lost != 0 {
		t.Fatalf("%d records, %d lost", len(records), lost)
	}
	for _, rec := range records {
		for _, secret := range []string{"4711", "hunter2", tok[:20], tok[len(tok)-20:]} {
			if bytes.Contains(rec, []byte(secret)) {
				t.Errorf("%q in %s", secret, rec)
			}
		}
	}
	var refusal, allow Record
	for i, into := range []*Record{&refusal, &allow} {
		if err := json.Unmarshal(records[i], into); err != nil {
			t.Fatalf("%v: %s", err, records[i])
		}
	}
	want := Record{
		Time: r.Time.UTC(), RequestID: r.ID, Node: "n1", Source: src.ID, Destination: w.identity("payments").ID, Client: r.Peer.Address,
		Address: r.Destination, Protocol: "http", Method: "GET", Path: "/v1/payments/{id}", Upgrade: "websocket", Decision: "allow", Mode: "enforce", Stage: "policy",
		Policy: "shop/payments", Rule: "read", Position: d.Position, LatencyMicros: 42, Channel: "tunnel", Anchor: "tpm", BytesIn: 10, BytesOut: 20,
	}
	want.Position = allow.Position // checked by TestDecisions
	if !reflect.DeepEqual(allow, want) {
		t.Errorf("got  %+v\nwant %+v", allow, want)
	}
	if refusal.Decision != "deny" || refusal.Reason != flow.ReasonNoRule || refusal.WouldDeny || refusal.Path != "" || refusal.LatencyMicros != 7000 {
		t.Errorf("refusal %+v", refusal)
	}
	e, ok := w.p.Explain(denied.ID)
	if !ok || len(e.Steps) < 4 || e.Steps[0].Stage != "channel" || e.Reason != flow.ReasonNoRule {
		t.Errorf("explain: %+v %v", e, ok)
	}
	if e, ok := w.p.Explain(r.ID); !ok || len(e.Steps) != 5 || e.Decision != "allow" {
		t.Errorf("an allowed call: %+v %v", e, ok)
	}
	// Further ones of the same second only as many, or while all are wanted.
	call := func(id string) {
		r.ID, r.Upgrade = id, false
		w.p.Decide(w.env, r, src, w.api("payments"), &d)
		w.env.Loop.Record(r, w.api("payments"), &d, Outcome{})
	}
	for i := range KeptAllows {
		call(fmt.Sprint("more", i))
	}
	last := fmt.Sprint("more", KeptAllows-1)
	if _, ok := w.p.Explain(last); ok {
		t.Errorf("more than %d in a second are kept", KeptAllows)
	}
	w.p.SetTracing(true)
	call("traced")
	if e, ok := w.p.Explain("traced"); !ok || len(e.Steps) != 5 {
		t.Errorf("with tracing: %+v %v", e, ok)
	}
	if _, ok := w.p.Explain(denied.ID); !ok {
		t.Error("allowed calls drive a refusal out")
	}
}

// FuzzRecord holds the encoder against encoding/json.
func FuzzRecord(f *testing.F) {
	f.Add("GET", "a\"b\\c\n\x00\x7f\xff\u2028é", "spiffe://x", int64(-5))
	f.Add("", "", "", int64(0))
	f.Fuzz(func(t *testing.T, method, detail, source string, n int64) {
		r := Record{Time: time.Unix(1, 5).UTC(), Method: method, Detail: detail, Source: source, LatencyMicros: n, BytesIn: n, WouldDeny: n > 0,
			Client: netip.MustParseAddrPort("[2001:db8::1]:9"), Reason: flow.Reason(detail)}
		line := r.Append(nil)
		if bytes.ContainsAny(line, "\n\r") {
			t.Fatalf("more than a line: %q", line)
		}
		var got Record
		if err := json.Unmarshal(line, &got); err != nil {
			t.Fatalf("%v: %q", err, line)
		}
		text, err := json.Marshal(&r)
		if err != nil {
			t.Fatal(err)
		}
		var want Record
		if err := json.Unmarshal(text, &want); err != nil {
			t.Fatal(err)
		}
		separators := strings.NewReplacer("\u2028", "\ufffd", "\u2029", "\ufffd")
		for _, s := range []*string{&want.Method, &want.Detail, &want.Source, (*string)(&want.Reason)} {
			*s = separators.Replace(*s)
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("got  %+v\nwant %+v", got, want)
		}
	})
}

// TestQueues floods with allowed calls: refusals still come through, and what
// is lost is counted.
func TestQueues(t *testing.T) {
	p := New(Options{Ceiling: flow.ModeEnforce})
	l := p.NewLoop()
	req := &flow.Request{ID: "x", Method: "GET"}
	allow := flow.Decision{Effect: flow.EffectAllow, Stage: flow.StagePolicy}
	deny := flow.Decision{Effect: flow.EffectDeny, Enforced: true, Stage: flow.StageToken, Reason: flow.ReasonTokenExpired}
	for range 3 * queueSize {
		l.Record(req, nil, &allow, Outcome{})
	}
	for range 5 {
		l.Record(req, nil, &deny, Outcome{})
	}
	records, lost := p.TakeRecords(6)
	if len(records) != 6 || lost != 2*queueSize {
		t.Fatalf("%d records, %d lost", len(records), lost)
	}
	for i, r := range records {
		if want := i < 5; want != bytes.Contains(r, []byte("token_expired")) {
			t.Errorf("record %d: %s", i, r)
		}
	}
	rest := 0
	for {
		records, lost := p.TakeRecords(100)
		if lost != 0 {
			t.Errorf("%d lost twice", lost)
		}
		if len(records) == 0 {
			break
		}
		rest += len(records)
	}
	if rest != queueSize-1 {
		t.Errorf("%d left, want %d", rest, queueSize-1)
	}
	for range 2 * recentSize {
		l.Record(req, nil, &deny, Outcome{})
	}
	if n := len(l.refused.items); n != recentSize {
		t.Errorf("%d decisions can be explained, at most %d", n, recentSize)
	}
}

func TestCounters(t *testing.T) {
	p := New(Options{Ceiling: flow.ModeEnforce})
	a, b := p.NewLoop(), p.NewLoop()
	req := &flow.Request{}
	allow := flow.Decision{Effect: flow.EffectAllow, Enforced: true, Stage: flow.StagePolicy}
	deny := flow.Decision{Effect: flow.EffectDeny, Stage: flow.StageToken, Reason: flow.ReasonTokenExpired}
	a.Record(req, nil, &allow, Outcome{Took: 9 * time.Microsecond})
	b.Record(req, nil, &allow, Outcome{Took: 2 * time.Second})
	b.Record(req, nil, &deny, Outcome{Took: 30 * time.Microsecond})
	p.Live().Add(Stream{Kill: func(flow.Reason) {}})
	c := p.Counters()
	want := []Counter{
		{Stage: flow.StagePolicy, Enforced: true, Count: 2},
		{Stage: flow.StageToken, Reason: flow.ReasonTokenExpired, Effect: flow.EffectDeny, Count: 1},
	}
	if !reflect.DeepEqual(c.Decisions, want) {
		t.Errorf("got  %+v\nwant %+v", c.Decisions, want)
	}
	if c.Latency[0] != 1 || c.Latency[2] != 1 || c.Latency[len(c.Latency)-1] != 1 || c.Streams != 1 {
		t.Errorf("latency %v, streams %d", c.Latency, c.Streams)
	}
}
