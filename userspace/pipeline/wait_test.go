// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"sync/atomic"
	"testing"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

var _ Blocker = (*netloop.Task)(nil)

// parking answers the request for keys while a decision waits, and has
// another decision taken on the same loop meanwhile, as netloop would.
type parking struct {
	w         *world
	meanwhile func()
	waits     int
}

func (p *parking) Block(f func()) {
	p.waits++
	p.meanwhile()
	f()
}

// TestKeysPending judges a token whose key is fetched meanwhile.
func TestKeysPending(t *testing.T) {
	for _, answered := range []bool{true, false} {
		w := newWorld(t, "enforce")
		var asked atomic.Int32
		w.tokens = token.New(token.Options{Refresh: func(string) { asked.Add(1) }})
		if err := w.tokens.SetIssuer(token.Issuer{Name: "shop/sso", URL: issuerURL, Algorithms: []string{"ES256"}}); err != nil {
			t.Fatal(err)
		}
		w.p.opt.Tokens = w.tokens
		p := &parking{w: w, meanwhile: func() {
			if answered {
				if err := w.tokens.SetKeys("shop/sso", w.jwks, w.now); err != nil {
					t.Error(err)
				}
			} else {
				w.tokens.KeysFailed("shop/sso", "down")
			}
		}}
		w.env.Task = p
		d := w.decide(w.request("GET /v1/payments/5", bearer(w.token("cnf"))), "payments")
		if answered && d.Effect != flow.EffectAllow || !answered && d.Reason != flow.ReasonTokenUnavailable {
			t.Errorf("keys answered %v: %s/%s %s", answered, d.Stage, d.Reason, d.Detail)
		}
		if p.waits != 1 || asked.Load() != 1 {
			t.Errorf("waited %d times, asked %d times", p.waits, asked.Load())
		}
	}
}

// TestInterleaved takes decisions on one loop while another waits: each has
// its own scratch memory.
func TestInterleaved(t *testing.T) {
	w := newWorld(t, "enforce")
	inner := 0
	w.env.Task = &parking{w: w, meanwhile: func() {
		env := Env{Loop: w.env.Loop, Task: Direct{}}
		for _, c := range []struct {
			line   string
			reason flow.Reason
		}{{"DELETE /v1/payments", flow.ReasonNoRule}, {"GET /ok", ""}, {"GET /debug/x", flow.ReasonDenyRule}} {
			var d flow.Decision
			w.p.Decide(env, w.request(c.line), w.identity("checkout"), w.api("payments"), &d)
			if d.Reason != c.reason {
				t.Errorf("%s meanwhile: %s", c.line, d.Reason)
			}
			inner++
		}
	}}
	d := w.decide(w.request("POST /v1/payments", bearer(w.token()), header("X-Account", "a1")), "payments")
	if d.Effect != flow.EffectAllow || d.Rule != "create" || d.Template != "/v1/payments" || inner != 3 {
		t.Errorf("after waiting: %+v, %d others", d, inner)
	}
	if n := len(w.env.Loop.free); n != 2 {
		t.Errorf("%d scratch memories, want 2", n)
	}
}

// TestBrokenOff leaves a refusal where a decision panics.
func TestBrokenOff(t *testing.T) {
	w := newWorld(t, "enforce")
	w.env.Task = &parking{w: w, meanwhile: func() { panic("broken off") }}
	var d flow.Decision
	func() {
		defer func() {
			if recover() == nil {
				t.Error("no panic")
			}
		}()
		r := w.request("POST /v1/payments", bearer(w.token()), header("X-Account", "a1"))
		w.p.Decide(w.env, r, w.identity("checkout"), w.api("payments"), &d)
	}()
	if !d.Refused() || d.Reason != flow.ReasonInternal {
		t.Errorf("after a panic: %+v", d)
	}
}
