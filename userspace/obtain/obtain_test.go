// SPDX-License-Identifier: Apache-2.0

package obtain

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/obtain/issuertest"
)

const clientID = "spiffe://example.org/client"

// world is a source with an issuer and one identity's leaves.
type world struct {
	*Source
	t      *testing.T
	issuer *issuertest.Issuer
	leaves *identity.Leaves
	addr   string
	dials  atomic.Int32
	down   atomic.Bool
	now    atomic.Int64 // added to the clock
}

func newWorld(t *testing.T, leafTTL time.Duration) *world {
	t.Helper()
	ca, err := identity.OpenCA(identity.CAOptions{StateDir: t.TempDir(), TrustDomain: "example.org", Node: "n", TPM: "none"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ca.Close() })
	w := &world{t: t, issuer: issuertest.New(t, "https://sso.example", "sso.example")}
	w.leaves = identity.NewLeaves(identity.LeavesOptions{Sign: func(_ context.Context, id string, csr []byte) ([][]byte, error) {
		return ca.Sign(csr, id, leafTTL)
	}})
	t.Cleanup(w.leaves.Close)
	if err := w.leaves.Set([]string{clientID}); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.addr = l.Addr().String()
	w.issuer.Serve(l)
	w.Source = New(Options{Leaves: w.leaves, Roots: w.issuer.Roots, Now: func() time.Time { return time.Now().Add(time.Duration(w.now.Load())) },
		Dial: func(ctx context.Context, id, issuer string) (net.Conn, error) {
			w.dials.Add(1)
			if id != clientID || issuer != "shop/sso" || w.down.Load() {
				return nil, errors.New("the plan forbids it")
			}
			return (&net.Dialer{}).DialContext(ctx, "tcp", w.addr)
		}})
	t.Cleanup(w.Source.Close)
	return w
}

func want() Want {
	return Want{ID: clientID, To: "shop/payments", Issuer: "shop/sso", URL: "https://sso.example:8443/token?tenant=1", ClientID: "checkout",
		Audience: "payments", Scopes: []string{"pay", "read"}, MaxLifetime: 15 * time.Minute}
}

// await waits for a token that f takes.
func (w *world) await(f func(*Token) bool) *Token {
	w.t.Helper()
	changed := make(chan struct{}, 1)
	stop := w.Watch(clientID, "shop/payments", func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	defer stop()
	timeout := time.After(20 * time.Second)
	for {
		if t := w.Newest(clientID, "shop/payments"); t != nil && f(t) {
			return t
		}
		select {
		case <-changed:
		case <-timeout:
			w.t.Fatalf("no such token: %+v", w.Status())
		}
	}
}

func TestObtain(t *testing.T) {
	w := newWorld(t, time.Minute)
	if w.Newest(clientID, "shop/payments") != nil || w.Pending(clientID, "shop/payments") {
		t.Error("there is a token that nobody wants")
	}
	w.Await(t.Context(), clientID, "shop/payments") // returns at once
	if err := w.Set([]Want{want()}); err != nil {
		t.Fatal(err)
	}
	w.Await(t.Context(), clientID, "shop/payments")
	token := w.await(func(*Token) bool { return true })
	leaf, err := w.leaves.Get(clientID)
	if err != nil {
		t.Fatal(err)
	}
	if w.Pending(clientID, "shop/payments") || token.Thumbprint != leaf.Thumbprint || !strings.HasPrefix(string(token.Field), "Bearer ey") ||
		time.Until(token.Expires) > 5*time.Minute || time.Until(token.Expires) < 4*time.Minute {
		t.Errorf("%+v", token)
	}
	r := w.issuer.Await(1)[0]
	if r.ID != clientID || r.Thumbprint != leaf.Thumbprint {
		t.Errorf("the client showed %s", r.ID)
	}
	if got, want := r.Form.Encode(), "audience=payments&client_id=checkout&grant_type=client_credentials&scope=pay+read"; got != want {
		t.Errorf("form %s, want %s", got, want)
	}
	if s := w.Status(); len(s) != 1 || s[0].Error != "" || !s[0].Expires.Equal(token.Expires) || s[0].Issuer != "shop/sso" {
		t.Errorf("%+v", s)
	}
	// What stays is not asked for again.
	if err := w.Set([]Want{want()}); err != nil {
		t.Fatal(err)
	}
	if w.Newest(clientID, "shop/payments").Thumbprint != token.Thumbprint || w.dials.Load() != 1 {
		t.Error("it was asked for again")
	}
	other := want()
	other.Audience = "https://pay.example/v1"
	if err := w.Set([]Want{other}); err != nil {
		t.Fatal(err)
	}
	if r := w.issuer.Await(2)[1]; r.Form.Get("resource") != "https://pay.example/v1" || r.Form.Get("audience") != "https://pay.example/v1" {
		t.Errorf("form %v", r.Form)
	}
	if err := w.Set(nil); err != nil {
		t.Fatal(err)
	}
	if w.Newest(clientID, "shop/payments") != nil || len(w.Status()) != 0 || w.All(clientID, "shop/payments") != nil {
		t.Error("it is kept")
	}
	if err := w.Set(make([]Want, MaxWants+1)); err == nil {
		t.Error("any number is kept")
	}
}

// TestRotation holds that there is a token for each leaf that has not expired.
func TestRotation(t *testing.T) {
	w := newWorld(t, 2*time.Second)
	if err := w.Set([]Want{want()}); err != nil {
		t.Fatal(err)
	}
	first := w.await(func(*Token) bool { return true })
	var list []Token
	second := w.await(func(k *Token) bool {
		list = w.All(clientID, "shop/payments")
		return k.Thumbprint != first.Thumbprint && len(list) > 0 && list[len(list)-1].Thumbprint == k.Thumbprint
	})
	if len(list) == 0 || list[len(list)-1].Thumbprint != second.Thumbprint {
		t.Errorf("%d tokens", len(list))
	}
	seen := map[[32]byte]bool{}
	for _, k := range list {
		if seen[k.Thumbprint] {
			t.Error("two tokens for a leaf")
		}
		seen[k.Thumbprint] = true
	}
	for _, r := range w.issuer.Requests() {
		if r.ID != clientID {
			t.Errorf("%s asked", r.ID)
		}
	}
}

// TestRenewal holds that a token is replaced before it ends.
func TestRenewal(t *testing.T) {
	w := newWorld(t, time.Minute)
	w.issuer.Life = 2 * time.Second
	if err := w.Set([]Want{want()}); err != nil {
		t.Fatal(err)
	}
	first := w.await(func(*Token) bool { return true })
	second := w.await(func(k *Token) bool { return k.Expires.After(first.Expires) })
	if second.Thumbprint != first.Thumbprint {
		t.Error("it is bound to another leaf")
	}
	// A token that has ended is none.
	w.now.Store(int64(time.Hour))
	if w.Newest(clientID, "shop/payments") != nil {
		t.Error("it has ended, and is used")
	}
}

// TestIssuerDown holds that a failure is told, tried again, and ends.
func TestIssuerDown(t *testing.T) {
	w := newWorld(t, time.Minute)
	w.down.Store(true)
	if err := w.Set([]Want{want()}); err != nil {
		t.Fatal(err)
	}
	w.Await(t.Context(), clientID, "shop/payments")
	if s := w.Status(); len(s) != 1 || !strings.Contains(s[0].Error, "ask shop/sso for a token: the plan forbids it") || !s[0].Expires.IsZero() {
		t.Errorf("%+v", s)
	}
	if w.Pending(clientID, "shop/payments") {
		t.Error("it is waited for")
	}
	w.down.Store(false)
	w.await(func(*Token) bool { return true })
	if s := w.Status(); s[0].Error != "" {
		t.Errorf("%+v", s)
	}
}

// TestUntrusted holds that no issuer is believed that proves nothing.
func TestUntrusted(t *testing.T) {
	w := newWorld(t, time.Minute)
	other := want()
	other.URL = "https://other.example/token"
	if err := w.Set([]Want{other}); err != nil {
		t.Fatal(err)
	}
	w.Await(t.Context(), clientID, "shop/payments")
	if s := w.Status(); !strings.Contains(s[0].Error, "other.example") || len(w.issuer.Requests()) != 0 {
		t.Errorf("%+v", s)
	}
}

// TestSlowIssuer holds that an issuer that says nothing, or never stops, holds
// up nothing, and that Close does not wait for it.
func TestSlowIssuer(t *testing.T) {
	w := newWorld(t, time.Minute)
	came := make(chan struct{}, 8)
	w.issuer.Answer = func(rw http.ResponseWriter, r *http.Request) bool {
		came <- struct{}{}
		rw.Header().Set("Content-Type", "application/json")
		for r.Context().Err() == nil {
			if _, err := rw.Write([]byte(strings.Repeat(" ", 1<<10))); err != nil {
				break
			}
		}
		return true
	}
	if err := w.Set([]Want{want()}); err != nil {
		t.Fatal(err)
	}
	<-came
	w.Await(t.Context(), clientID, "shop/payments")
	if s := w.Status(); s[0].Error == "" {
		t.Errorf("%+v", s)
	}
	w.issuer.Lock()
	w.issuer.Answer = func(_ http.ResponseWriter, r *http.Request) bool {
		came <- struct{}{}
		<-r.Context().Done()
		return true
	}
	w.issuer.Unlock()
	<-came
	w.Source.Close()
}

// TestWatch holds that who watches is told of all that Set changes.
func TestWatch(t *testing.T) {
	w := newWorld(t, time.Minute)
	told := make(chan struct{}, 64)
	stop := w.Watch(clientID, "shop/payments", func() { told <- struct{}{} })
	other := w.Watch(clientID, "shop/other", func() { t.Error("it is told of what it does not watch") })
	if err := w.Set([]Want{want()}); err != nil {
		t.Fatal(err)
	}
	for w.Newest(clientID, "shop/payments") == nil {
		<-told
	}
	changed := want()
	changed.Scopes = nil
	if err := w.Set([]Want{changed}); err != nil {
		t.Fatal(err)
	}
	for {
		<-told
		if len(w.issuer.Requests()) == 2 && w.Newest(clientID, "shop/payments") != nil {
			break
		}
	}
	if err := w.Set(nil); err != nil {
		t.Fatal(err)
	}
	for len(w.All(clientID, "shop/payments")) > 0 {
		<-told
	}
	stop()
	stop()
	other()
	for len(told) > 0 {
		<-told
	}
	if err := w.Set([]Want{want()}); err != nil {
		t.Fatal(err)
	}
	w.Await(t.Context(), clientID, "shop/payments")
	if len(told) > 0 || len(w.watchers.by) > 0 {
		t.Errorf("told %d times after the end, %d watch", len(told), len(w.watchers.by))
	}
}

// silent has many identities want tokens of an issuer that does not answer, and
// the client one of the other.
func (w *world) silent(n int) (ids []string, dials *atomic.Int32, most *atomic.Int32) {
	w.t.Helper()
	wants := make([]Want, n, n+1)
	ids, dials, most = make([]string, n), new(atomic.Int32), new(atomic.Int32)
	for i := range wants {
		ids[i] = fmt.Sprintf("spiffe://example.org/other/%d", i)
		wants[i] = want()
		wants[i].ID, wants[i].Issuer = ids[i], "shop/silent"
	}
	if err := w.leaves.Set(append(ids, clientID)); err != nil {
		w.t.Fatal(err)
	}
	for _, id := range ids {
		if _, err := w.leaves.Wait(w.t.Context(), id); err != nil {
			w.t.Fatal(err)
		}
	}
	dial := w.opt.Dial
	var now atomic.Int32
	w.opt.Dial = func(ctx context.Context, id, issuer string) (net.Conn, error) {
		if issuer != "shop/silent" {
			return dial(ctx, id, issuer)
		}
		dials.Add(1)
		if at := now.Add(1); at > most.Load() {
			most.Store(at)
		}
		defer now.Add(-1)
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if err := w.Set(append(wants, want())); err != nil {
		w.t.Fatal(err)
	}
	return ids, dials, most
}

// TestSilentIssuer holds that one that does not answer keeps nobody from
// another.
func TestSilentIssuer(t *testing.T) {
	w := newWorld(t, time.Minute)
	w.timeout = time.Hour
	_, _, most := w.silent(4 * atOnce)
	w.await(func(*Token) bool { return true })
	if got := most.Load(); got > atOnceNew {
		t.Errorf("%d requests at once to one issuer", got)
	}
}

// TestManyOfOneIssuer holds that an issuer which answers is asked for several
// tokens at once, and not for any number.
func TestManyOfOneIssuer(t *testing.T) {
	w := newWorld(t, time.Minute)
	const n = 4 * atOnceOne
	wants := []Want{want()}
	for i := range n {
		one := want()
		one.To = fmt.Sprint("shop/", i)
		wants = append(wants, one)
	}
	var now, most atomic.Int32
	full := make(chan struct{})
	filled := sync.OnceFunc(func() { close(full) })
	answer := func(http.ResponseWriter, *http.Request) bool {
		w.issuer.Unlock() // it is held for a request
		defer w.issuer.Lock()
		at := now.Add(1)
		defer now.Add(-1)
		if at > most.Load() {
			most.Store(at)
		}
		if at == atOnceOne {
			filled()
		}
		select {
		case <-full:
		case <-time.After(20 * time.Second):
			t.Error("fewer come at once")
		}
		return false
	}
	if err := w.Set(wants[:1]); err != nil {
		t.Fatal(err)
	}
	w.await(func(*Token) bool { return true })
	w.issuer.Lock()
	w.issuer.Answer = answer
	w.issuer.Unlock()
	if err := w.Set(wants); err != nil {
		t.Fatal(err)
	}
	for _, one := range wants {
		w.Await(t.Context(), clientID, one.To)
		if w.Newest(clientID, one.To) == nil {
			t.Errorf("no token for %s: %+v", one.To, w.Status())
		}
	}
	if got := most.Load(); got > atOnceOne {
		t.Errorf("%d at once", got)
	}
}

// TestSilentIssuerPaused holds that all who want something of an issuer that
// does not answer soon know, by few requests.
func TestSilentIssuerPaused(t *testing.T) {
	w := newWorld(t, time.Minute)
	w.timeout = 20 * time.Millisecond
	began := time.Now()
	ids, dials, _ := w.silent(4 * atOnce)
	for _, id := range ids {
		w.Await(t.Context(), id, "shop/payments")
	}
	for _, s := range w.Status() {
		if s.ID != clientID && !strings.Contains(s.Error, "deadline") {
			t.Errorf("%+v", s)
		}
	}
	if got, most := dials.Load(), atOnceNew*(1+int32(time.Since(began)/retryMin)); got > most {
		t.Errorf("%d requests, want at most %d", got, most)
	}
}

func TestAnswers(t *testing.T) {
	kind := http.Header{"Content-Type": {"application/json; charset=utf-8"}}
	for _, c := range []struct {
		status int
		h      http.Header
		body   string
		life   time.Duration
		why    string
	}{
		{200, kind, `{"access_token":"a.b.c","token_type":"bearer","expires_in":300}`, 5 * time.Minute, ""},
		{200, kind, `{"access_token":"a.b.c","token_type":"Bearer"}`, time.Minute, ""},
		{200, kind, `{"access_token":"a.b.c","token_type":"Bearer","expires_in":1e30}`, 24 * time.Hour, ""},
		{200, kind, `{"access_token":"a.b.c","token_type":"Bearer","expires_in":0}`, 0, "does not live"},
		{200, kind, `{"access_token":"a.b.c","token_type":"Bearer","expires_in":-5}`, 0, "does not live"},
		{200, kind, `{"access_token":"a.b.c","token_type":"DPoP","expires_in":5}`, 0, "not of type Bearer"},
		{200, kind, `{"access_token":"","token_type":"Bearer"}`, 0, "no form"},
		{200, kind, `{"access_token":"a b\r\nX: y","token_type":"Bearer"}`, 0, "no form"},
		{200, kind, `{"access_token":"` + strings.Repeat("a", 17<<10) + `","token_type":"Bearer"}`, 0, "no form"},
		{200, kind, `[]`, 0, "not JSON of the form"},
		{200, http.Header{"Content-Type": {"text/html"}}, `{"access_token":"a","token_type":"Bearer"}`, 0, "not application/json"},
		{200, http.Header{"Content-Type": {"application/json"}, "Content-Encoding": {"gzip"}}, ``, 0, "compressed"},
		{401, kind, `{"error":"invalid_client","error_description":"secret"}`, 0, "invalid_client"},
		{401, kind, `{"error":"INVALID\n","access_token":"secret"}`, 0, "the answer is 401"},
		{302, kind, ``, 0, "the answer is 302"},
	} {
		a, err := parseAnswer(c.status, c.h, []byte(c.body))
		switch {
		case c.why == "" && (err != nil || a.life != c.life || a.token != "a.b.c"):
			t.Errorf("%s: %v, %v", c.body, a.life, err)
		case c.why != "" && (err == nil || !strings.Contains(err.Error(), c.why) || strings.Contains(err.Error(), "secret")):
			t.Errorf("%.80s: %v, want %s", c.body, err, c.why)
		}
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add(200, "application/json", []byte(`{"access_token":"a.b.c","token_type":"bearer","expires_in":300}`))
	f.Add(400, "application/json", []byte(`{"error":"invalid_client"}`))
	f.Fuzz(func(t *testing.T, status int, kind string, body []byte) {
		a, err := parseAnswer(status, http.Header{"Content-Type": {kind}}, body)
		if err == nil && (a.token == "" || strings.ContainsAny(a.token, " \r\n\x00") || a.life < time.Second || a.life > maxLife) {
			t.Errorf("%q lives %s", a.token, a.life)
		}
	})
}
