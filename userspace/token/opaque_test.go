// SPDX-License-Identifier: Apache-2.0

package token

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// opaqueIssuer is a verifier whose issuer is asked about tokens.
type opaqueIssuer struct {
	*Verifier
	mu     sync.Mutex
	now    time.Time
	asked  []string
	answer func(token string) ([]byte, error)
}

func newOpaque(t testing.TB, change func(*Issuer)) *opaqueIssuer {
	t.Helper()
	o := &opaqueIssuer{now: time.Now()}
	o.Verifier = New(Options{Now: o.clock, Introspect: func(_ context.Context, issuer, token string) ([]byte, error) {
		o.mu.Lock()
		o.asked = append(o.asked, token)
		answer := o.answer
		o.mu.Unlock()
		if issuer != testIssuer {
			return nil, errors.New("another issuer")
		}
		return answer(token)
	}})
	one := Issuer{Name: testIssuer, URL: testURL, Introspect: true, NoKeys: true, MaxLifetime: 15 * time.Minute}
	if change != nil {
		change(&one)
	}
	if err := o.SetIssuer(one); err != nil {
		t.Fatal(err)
	}
	return o
}

func (o *opaqueIssuer) clock() time.Time {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.now
}

func (o *opaqueIssuer) pass(d time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.now = o.now.Add(d)
}

func (o *opaqueIssuer) answers(claims map[string]any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.answer = func(string) ([]byte, error) { return json.Marshal(claims) }
}

// verify does as the pipeline does, and says whether the issuer was asked.
func (o *opaqueIssuer) verify(token string, c *Check) (claims *Claims, reason flow.Reason, asked bool, err error) {
	c.Now = o.clock()
	claims, reason, err = o.Verify([]byte(token), c)
	if errors.Is(err, ErrAnswerPending) {
		asked = true
		o.Introspect(context.Background(), []byte(token), "caller", c)
		claims, reason, err = o.Verify([]byte(token), c)
	}
	return claims, reason, asked, err
}

func active(now time.Time) map[string]any { return with(claimsAt(now), "active", true) }

// TestOpaque holds that an opaque token is what its issuer says, for as long
// as that may count.
func TestOpaque(t *testing.T) {
	o := newOpaque(t, nil)
	o.answers(active(o.clock()))
	claims, reason, asked, err := o.verify("opaque", check())
	if reason != flow.ReasonOK || !asked || claims.Subject != "alice" || claims.SubjectKey != testURL+"|alice" || claims.TokenKey != testURL+"|id-1" {
		t.Fatalf("%+v, %q, %t, %v", claims, reason, asked, err)
	}
	o.pass(answerLife - time.Second)
	if _, reason, asked, err := o.verify("opaque", check()); reason != flow.ReasonOK || asked {
		t.Errorf("within a minute: %q, asked %t, %v", reason, asked, err)
	}
	// What depends on the request is judged each time.
	k := check()
	k.Scopes = []string{"other"}
	if _, reason, _, _ := o.verify("opaque", k); reason != flow.ReasonTokenScope {
		t.Errorf("another scope: %q", reason)
	}
	o.answers(map[string]any{"active": false})
	o.pass(2 * time.Second)
	if _, reason, asked, _ := o.verify("opaque", check()); reason != flow.ReasonTokenInactive || !asked {
		t.Errorf("revoked: %q, asked %t", reason, asked)
	}
	if _, reason, asked, _ := o.verify("opaque", check()); reason != flow.ReasonTokenInactive || asked {
		t.Errorf("again: %q, asked %t", reason, asked)
	}
	o.answers(active(o.clock()))
	o.pass(inactiveLife)
	if _, reason, asked, _ := o.verify("opaque", check()); reason != flow.ReasonOK || !asked {
		t.Errorf("active again: %q, asked %t", reason, asked)
	}
	// No longer than the token itself.
	o.answers(with(active(o.clock()), "exp", o.clock().Add(10*time.Second).Unix()))
	if _, reason, _, _ := o.verify("short", check()); reason != flow.ReasonOK {
		t.Errorf("short: %q", reason)
	}
	o.pass(11 * time.Second)
	if _, reason, asked, _ := o.verify("short", check()); reason != flow.ReasonTokenExpired || !asked {
		t.Errorf("short, later: %q, asked %t", reason, asked)
	}
	// An issuer whose settings change is another.
	if err := o.SetIssuer(Issuer{Name: testIssuer, URL: testURL, Introspect: true, NoKeys: true, MaxLifetime: time.Hour}); err != nil {
		t.Fatal(err)
	}
	o.answers(active(o.clock()))
	if _, _, asked, _ := o.verify("opaque", check()); !asked {
		t.Error("what another issuer said counts")
	}
	if err := o.SetRevocations([]Revocation{{Kind: "subject", Value: testURL + "|alice", Since: o.clock()}}); err != nil {
		t.Fatal(err)
	}
	if _, reason, _, _ := o.verify("opaque", check()); reason != flow.ReasonTokenRevoked {
		t.Errorf("revoked here: %q", reason)
	}
}

// TestOpaqueAnswers is the conformance table of answers.
func TestOpaqueAnswers(t *testing.T) {
	leaf := [32]byte{1}
	for _, c := range []struct {
		name   string
		change func(map[string]any) any
		want   flow.Reason
	}{
		{"without iss", func(m map[string]any) any { return with(m, "iss", nil) }, flow.ReasonOK},
		{"without sub", func(m map[string]any) any { return with(m, "sub", nil) }, flow.ReasonOK},
		{"aud a list", func(m map[string]any) any { return with(m, "aud", []string{"x", testAudience}) }, flow.ReasonOK},
		{"without sub and client_id", func(m map[string]any) any { return with(with(m, "sub", nil), "client_id", nil) }, flow.ReasonTokenUnavailable},
		{"another iss", func(m map[string]any) any { return with(m, "iss", "https://evil.example") }, flow.ReasonTokenUnavailable},
		{"not active", func(m map[string]any) any { return with(m, "active", false) }, flow.ReasonTokenInactive},
		{"active a text", func(m map[string]any) any { return with(m, "active", "true") }, flow.ReasonTokenUnavailable},
		{"without active", func(m map[string]any) any { return with(m, "active", nil) }, flow.ReasonTokenUnavailable},
		{"ACTIVE", func(m map[string]any) any { return with(with(m, "active", false), "ACTIVE", true) }, flow.ReasonTokenUnavailable},
		{"a list", func(map[string]any) any { return []string{} }, flow.ReasonTokenUnavailable},
		{"too long", func(m map[string]any) any { return with(m, "x", strings.Repeat("y", MaxAnswer)) }, flow.ReasonTokenUnavailable},
		{"without aud", func(m map[string]any) any { return with(m, "aud", nil) }, flow.ReasonTokenAudience},
		{"another aud", func(m map[string]any) any { return with(m, "aud", "x") }, flow.ReasonTokenAudience},
		{"without exp", func(m map[string]any) any { return with(m, "exp", nil) }, flow.ReasonTokenLifetime},
		{"exp a text", func(m map[string]any) any { return with(m, "exp", "1") }, flow.ReasonTokenUnavailable},
		{"expired", func(m map[string]any) any { return with(m, "exp", time.Now().Add(-time.Minute).Unix()) }, flow.ReasonTokenExpired},
		{"not yet", func(m map[string]any) any { return with(m, "nbf", time.Now().Add(time.Minute).Unix()) }, flow.ReasonTokenNotYet},
		{"too long a life", func(m map[string]any) any { return with(m, "exp", time.Now().Add(time.Hour).Unix()) }, flow.ReasonTokenLifetime},
		{"bound to a certificate", func(m map[string]any) any { return with(m, "cnf", map[string]any{"x5t#S256": b64(leaf[:])}) }, flow.ReasonTokenProof},
		{"bound to a key", func(m map[string]any) any { return with(m, "cnf", map[string]any{"jkt": b64(leaf[:])}) }, flow.ReasonTokenProof},
	} {
		o := newOpaque(t, nil)
		m := c.change(active(o.clock()))
		o.answer = func(string) ([]byte, error) { return json.Marshal(m) }
		_, reason, asked, err := o.verify("opaque", check())
		if reason != c.want || !asked || (err == nil) != (reason == flow.ReasonOK) {
			t.Errorf("%s: %q (%v), want %q", c.name, reason, err, c.want)
		}
	}
}

// TestOpaqueOrSigned holds which tokens the issuer is asked about.
func TestOpaqueOrSigned(t *testing.T) {
	s := newES256(t, "k1")
	o := newOpaque(t, func(i *Issuer) { i.NoKeys = false })
	if err := o.SetKeys(testIssuer, jwks(t, s.jwk()), o.clock()); err != nil {
		t.Fatal(err)
	}
	o.answers(active(o.clock()))
	signed := string(s.sign(t, s.header(), claimsAt(o.clock())))
	for token, want := range map[string]bool{"opaque": true, "a.b": true, "a.b.c": true, "e30.e30.e30": false, signed: false, signed[:len(signed)-4] + "AAAA": false} {
		if _, _, asked, err := o.verify(token, check()); asked != want {
			t.Errorf("%.40s: asked %t, %v", token, asked, err)
		}
	}
	// One that has no keys is asked about all.
	n := newOpaque(t, nil)
	n.answers(active(n.clock()))
	if _, reason, asked, _ := n.verify(signed, check()); !asked || reason != flow.ReasonOK {
		t.Errorf("asked %t, %q", asked, reason)
	}
	// And one that is not to be asked is not.
	v := newVerifier(t, s)
	if _, reason, err := v.Verify([]byte("opaque"), check()); reason != flow.ReasonTokenMalformed || errors.Is(err, ErrAnswerPending) {
		t.Errorf("%q, %v", reason, err)
	}
}

// TestOpaqueFailure holds that no answer refuses, for a moment.
func TestOpaqueFailure(t *testing.T) {
	o := newOpaque(t, nil)
	o.answer = func(string) ([]byte, error) { return nil, errors.New("down") }
	if _, reason, asked, err := o.verify("opaque", check()); reason != flow.ReasonTokenUnavailable || !asked || !strings.Contains(err.Error(), "down") {
		t.Errorf("%q, asked %t, %v", reason, asked, err)
	}
	if _, reason, asked, _ := o.verify("opaque", check()); reason != flow.ReasonTokenUnavailable || asked {
		t.Errorf("at once again: %q, asked %t", reason, asked)
	}
	o.answers(active(o.clock()))
	o.pass(failureLife)
	if _, reason, _, err := o.verify("opaque", check()); reason != flow.ReasonOK {
		t.Errorf("up again: %q, %v", reason, err)
	}
}

// TestOpaqueFlood holds that many tokens which nobody knows reach the issuer
// in a measure, and cost others nothing but theirs.
func TestOpaqueFlood(t *testing.T) {
	o := newOpaque(t, nil)
	o.answers(map[string]any{"active": false})
	refused := 0
	for n := range 500 {
		k := check()
		if _, _, err := o.Verify(fmt.Append(nil, "t", n), k); !errors.Is(err, ErrAnswerPending) {
			t.Fatal(err)
		}
		o.Introspect(t.Context(), fmt.Append(nil, "t", n), "flood", k)
		if _, reason, err := o.Verify(fmt.Append(nil, "t", n), k); errors.Is(err, ErrAskedMuch) && reason == flow.ReasonTokenUnavailable {
			refused++
		}
	}
	if len(o.asked) != askBurst || refused != 500-askBurst {
		t.Errorf("%d questions, %d refused", len(o.asked), refused)
	}
	o.answers(active(o.clock()))
	if _, reason, _, err := o.verify("mine", check()); reason != flow.ReasonOK {
		t.Errorf("another caller: %q, %v", reason, err)
	}
	for n := range 2 * maxRefused {
		o.mu.Lock()
		now := o.now
		o.mu.Unlock()
		i := (*o.issuers.Load())[testIssuer]
		i.questions.mu.Lock()
		i.questions.remember([32]byte{byte(n), byte(n >> 8), 1}, refusal{until: now.Add(time.Hour)}, now)
		i.questions.mu.Unlock()
	}
	if n := len((*o.issuers.Load())[testIssuer].questions.refused); n > maxRefused {
		t.Errorf("%d are remembered", n)
	}
}

// TestOpaqueAtOnce holds that many who bring the same token ask once.
func TestOpaqueAtOnce(t *testing.T) {
	o := newOpaque(t, nil)
	release := make(chan struct{})
	claims := active(o.clock())
	o.answer = func(string) ([]byte, error) {
		<-release
		return json.Marshal(claims)
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if _, reason, _, err := o.verify("opaque", check()); reason != flow.ReasonOK {
				t.Errorf("%q, %v", reason, err)
			}
		})
	}
	for late := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		o.mu.Lock()
		n := len(o.asked)
		o.mu.Unlock()
		if n > 0 || time.Now().After(late) {
			break
		}
	}
	// Who does not wait is refused.
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	k := check()
	o.Introspect(gone, []byte("opaque"), "caller", k)
	if _, reason, err := o.Verify([]byte("opaque"), k); reason != flow.ReasonTokenUnavailable || !errors.Is(err, context.Canceled) {
		t.Errorf("%q, %v", reason, err)
	}
	close(release)
	wg.Wait()
	if len(o.asked) != 1 {
		t.Errorf("%d questions", len(o.asked))
	}
}

func FuzzIntrospection(f *testing.F) {
	i := &issuer{Issuer: Issuer{URL: testURL}}
	now := time.Unix(1_800_000_000, 0)
	good, err := json.Marshal(active(now))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"active":false}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		c, err := readAnswer(body, i, now)
		if (c == nil) == (err == nil) || err == nil && (c.Issuer != testURL || c.Subject == "" || c.until.After(now.Add(answerLife))) {
			t.Errorf("%q: %+v, %v", body, c, err)
		}
	})
}
