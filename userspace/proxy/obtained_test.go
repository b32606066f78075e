// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/obtain"
	"github.com/sallyport-dev/sallyport/userspace/obtain/issuertest"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http2"
	"github.com/sallyport-dev/sallyport/userspace/proxy/tunnel"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/tap"
)

// obtainingPlan has the client obtain tokens, which the server asks for.
func obtainingPlan(t *testing.T) *compile.Plan {
	t.Helper()
	text := strings.ReplaceAll(worldPolicies, "MODE", "enforce")
	for _, r := range [][2]string{
		{"mode: enforce, mayCall: [server], egress:", "mode: enforce, mayCall: [server], tokens: [{to: server, issuer: sso, audience: server}], egress:"},
		{`jwks: {url: "https://sso.t.example/jwks"}`, `jwks: {url: "https://sso.t.example/jwks"}, tokenURL: "https://sso.t.example/token"`},
		{"{name: all, from: [client], http: [\"* /**\"]}\n    - {name: no-debug", "{name: all, from: [client], http: [\"* /**\"], token: {issuer: sso, audience: server, boundTo: mtls}}\n    - {name: no-debug"},
	} {
		if !strings.Contains(text, r[0]) {
			t.Fatalf("the policies do not hold %q", r[0])
		}
		text = strings.Replace(text, r[0], r[1], 1)
	}
	return build(t, text)
}

// obtaining is a world in which the client's node obtains tokens.
type obtaining struct {
	in, app *node
	issuer  *issuertest.Issuer
	source  *obtain.Source
}

// want is what the plan has the client's node obtain.
func (o *obtaining) want(t *testing.T) {
	t.Helper()
	if err := o.source.Set([]obtain.Want{{ID: clientID, To: "t/server", Issuer: "t/sso", URL: "https://sso.t.example/token",
		ClientID: clientID, Audience: "server", MaxLifetime: 15 * time.Minute}}); err != nil {
		t.Fatal(err)
	}
}

func eachObtaining(t *testing.T, ttl time.Duration, f func(t *testing.T, o *obtaining)) {
	var o *obtaining
	setup := func(t *testing.T, in, app *node) {
		o.in, o.app = in, app
		for _, issuer := range pipeline.Issuers(app.pipeline.Plan()) {
			if err := errors.Join(app.tokens.SetIssuer(issuer), app.tokens.SetKeys(issuer.Name, o.issuer.JWKS(), time.Now())); err != nil {
				t.Fatal(err)
			}
		}
	}
	eachWay(t, nodeOptions{plan: obtainingPlan(t), ttl: ttl, change: func(opt *Options) {
		// Called for the node of the server, if there is one, before the client's.
		issuer := issuertest.New(t, "https://sso.t.example", "sso.t.example")
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		issuer.Serve(l)
		source := obtain.New(obtain.Options{Leaves: opt.Leaves, Roots: issuer.Roots, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
		}})
		t.Cleanup(source.Close)
		opt.Obtained = source
		o = &obtaining{issuer: issuer, source: source}
	}}, func(t *testing.T, in, app *node) {
		t.Cleanup(o.source.Close)
		setup(t, in, app)
		f(t, o)
	})
}

// TestObtained holds that a call bears the token that its node has obtained,
// from the first one on, and the application sees it.
func TestObtained(t *testing.T) {
	eachObtaining(t, 0, func(t *testing.T, o *obtaining) {
		o.app.app(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				t.Error(err)
			}
			w.Header().Set("Saw", strings.Join(r.Header.Values("Authorization"), ","))
			w.Write(append(body, r.URL.Path...))
		}), 80)
		addr := o.in.out(clientNumber, serverPort(80))
		o.want(t)
		client := httpClient(t)
		for n := range 3 {
			resp, err := client.Post("http://"+addr+"/x", "text/plain", strings.NewReader("body"))
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			saw := resp.Header.Get("Saw")
			if err != nil || resp.StatusCode != 200 || string(body) != "body/x" || strings.Count(saw, "Bearer ") != 1 || strings.Contains(saw, ",") {
				t.Fatalf("call %d: %d %q, saw %q, %v", n, resp.StatusCode, body, saw, err)
			}
		}
		if r := o.issuer.Requests(); len(r) != 1 || r[0].ID != clientID {
			t.Errorf("%d requests for tokens", len(r))
		}
		// What the application brings itself stays.
		req, err := http.NewRequest("GET", "http://"+addr+"/x", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer mine")
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if reason, _ := problem(t, resp); reason != flow.ReasonTokenMalformed {
			t.Errorf("another's token in place of its own: %d %s", resp.StatusCode, reason)
		}
		// Not for others.
		resp, err = client.Get("http://" + o.in.out(otherNumber, serverPort(80)) + "/x")
		if err == nil {
			if resp.Body.Close(); resp.StatusCode == 200 {
				t.Error("another identity got through")
			}
		}
		for _, r := range o.app.records() {
			if b := r.Detail; strings.Contains(b, "ey") && strings.Contains(b, "Bearer") {
				t.Errorf("a record holds a token: %s", b)
			}
		}
	})
}

// TestObtainedLarge holds that the head has room for any token.
func TestObtainedLarge(t *testing.T) {
	eachObtaining(t, 0, func(t *testing.T, o *obtaining) {
		o.issuer.Pad = 11 << 10
		o.app.app(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			if len(r.Header.Get("Authorization")) < 11<<10 || r.Header.Get("X-Own") != "mine" {
				w.WriteHeader(500)
			}
			w.Write(body)
		}), 80)
		addr := o.in.out(clientNumber, serverPort(80))
		o.want(t)
		c := dialTCP(t, addr)
		defer c.Close()
		large := bytes.Repeat([]byte("0123456789"), 20<<10)
		for range 3 {
			// The first bytes of the content come with the head.
			resp, err := ask(t, c, "POST /x HTTP/1.1\r\nHost: a\r\nX-Own: mine\r\nContent-Length: 204800\r\n\r\n"+string(large))
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || resp.StatusCode != 200 || !bytes.Equal(body, large) {
				t.Fatalf("%d, %d bytes, %v", resp.StatusCode, len(body), err)
			}
		}
	})
}

// TestObtainedHTTP2 is TestObtained for gRPC.
func TestObtainedHTTP2(t *testing.T) {
	eachObtaining(t, 0, func(t *testing.T, o *obtaining) {
		seen := make(chan []string, 4)
		server, _ := newEchoService(grpc.InTapHandle(func(ctx context.Context, info *tap.Info) (context.Context, error) {
			seen <- info.Header.Get("authorization")
			return ctx, nil
		}))
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go server.Serve(l) //nolint:errcheck // ends with Stop
		t.Cleanup(server.Stop)
		o.app.at(l.Addr().String(), 84)
		o.want(t)
		conn := rpcClient(t, o.in.out(clientNumber, serverPort(84)), nil)
		for range 2 {
			if got, err := call1(within(t), conn, "/t.Paid/Unary", "x"); err != nil {
				t.Fatalf("%q %v", got, err)
			}
			if saw := <-seen; len(saw) != 1 || !strings.HasPrefix(saw[0], "Bearer ey") {
				t.Errorf("the application saw %q", saw)
			}
		}
	})
}

// TestObtainedRotation holds that a connection which stays goes on while its
// node's certificates and tokens are replaced.
func TestObtainedRotation(t *testing.T) {
	eachObtaining(t, 3*time.Second, func(t *testing.T, o *obtaining) {
		o.issuer.Life = 2 * time.Second
		o.app.app(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), 80)
		addr := o.in.out(clientNumber, serverPort(80))
		o.want(t)
		client := httpClient(t)
		prints := map[[32]byte]bool{}
		for deadline := time.Now().Add(30 * time.Second); len(prints) < 3; {
			resp, err := client.Get("http://" + addr + "/x")
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != 200 {
				reason, _ := problem(t, resp)
				t.Fatalf("%d %s after %d leaves", resp.StatusCode, reason, len(prints))
			}
			io.Copy(io.Discard, resp.Body) //nolint:errcheck // it is empty
			resp.Body.Close()
			for _, r := range o.issuer.Requests() {
				prints[r.Thumbprint] = true
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d leaves in time", len(prints))
			}
			time.Sleep(5 * time.Millisecond) // a pace, nothing is waited for
		}
	})
}

// TestObtainedChange holds that a connection that is there already follows what
// the policies have its node obtain.
func TestObtainedChange(t *testing.T) {
	eachObtaining(t, 0, func(t *testing.T, o *obtaining) {
		saw := make(chan string, 1)
		o.app.app(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { saw <- r.Header.Get("Authorization") }), 80)
		client := httpClient(t)
		addr := o.in.out(clientNumber, serverPort(80))
		until := func(want int) {
			t.Helper()
			for deadline := time.Now().Add(20 * time.Second); ; { // each call is answered by what is known then
				resp, err := client.Get("http://" + addr + "/x")
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				if resp.StatusCode == want {
					return
				}
				if resp.StatusCode == 200 {
					<-saw
				}
				if time.Now().After(deadline) {
					t.Fatalf("still %d: %+v", resp.StatusCode, o.source.Status())
				}
			}
		}
		until(401)
		o.want(t)
		until(200)
		first := <-saw
		if err := o.source.Set(nil); err != nil {
			t.Fatal(err)
		}
		until(401)
		o.want(t)
		until(200)
		if again := <-saw; again == first {
			t.Error("the token of before the change came again")
		}
		if got := o.in.proxy.counts.tunnelDials.Load(); got > 1 {
			t.Errorf("%d tunnels", got)
		}
	})
}

// TestNotObtained holds that a call without its token is refused as one, and
// goes on once the issuer answers.
func TestNotObtained(t *testing.T) {
	eachObtaining(t, 0, func(t *testing.T, o *obtaining) {
		o.issuer.Answer = func(w http.ResponseWriter, _ *http.Request) bool {
			w.WriteHeader(503)
			return true
		}
		o.app.app(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), 80)
		addr := o.in.out(clientNumber, serverPort(80))
		o.want(t)
		client := httpClient(t)
		resp, err := client.Get("http://" + addr + "/x")
		if err != nil {
			t.Fatal(err)
		}
		if reason, _ := problem(t, resp); reason != flow.ReasonTokenMissing {
			t.Fatalf("%d %s", resp.StatusCode, reason)
		}
		o.issuer.Lock()
		o.issuer.Answer = nil
		o.issuer.Unlock()
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			resp, err := client.Get("http://" + addr + "/x")
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode == 200 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("still %d: %+v", resp.StatusCode, o.source.Status())
			}
		}
	})
}

// TestPresentedAgain holds that tokens which did not get to the other node are
// presented again by and by, those that it refuses for good when they change,
// and that a presenter ends with its tunnel.
func TestPresentedAgain(t *testing.T) {
	for _, answers := range [][]string{{"503", "429", "200"}, {"404", "400", "200"}} {
		for _, plain := range []bool{false, true} {
			e, err := netloop.New(netloop.Options{Loops: 1, Goroutines: plain})
			if err != nil {
				t.Fatal(err)
			}
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			source := obtain.New(obtain.Options{})
			g := &presenter{p: &Proxy{opt: Options{Obtained: source, Logger: slog.New(slog.DiscardHandler)}}, id: clientID, to: "t/server", given: true}
			came, ended := make(chan string, 8), make(chan struct{})
			e.Go(func(task *netloop.Task) {
				conn, err := task.Adopt(fds[0])
				if err != nil {
					t.Error(err)
					return
				}
				n := 0
				_ = http2.Serve(task, conn, http2.Config{}, func(_ *netloop.Task, s *http2.Stream) {
					status := "500"
					if n < len(answers) {
						status = answers[n]
					}
					n++
					if _, err := io.Copy(io.Discard, s); err != nil || s.SendHead([]http2.Field{{Name: ":status", Value: status}}, true) != nil {
						t.Errorf("answer %s: %v", status, err)
					}
					came <- status
				})
				conn.Close()
			})
			e.Go(func(task *netloop.Task) {
				conn, err := task.Adopt(fds[1])
				if err != nil {
					t.Error(err)
					return
				}
				stop := source.Watch(g.id, g.to, func() {})
				g.stop = func() { stop(); close(ended) }
				g.begin(task, tunnel.Dial(task, conn, tunnel.Config{OnEnd: g.stop}), time.Now().Add(20*time.Second))
			})
			for nth, want := range answers {
				if nth == 2 && answers[0] == "404" {
					e.Post(0, g.change)
				}
				select {
				case got := <-came:
					if got != want {
						t.Errorf("presentation %d was answered %s", nth, got)
					}
				case <-time.After(20 * time.Second):
					t.Fatalf("presentation %d did not come", nth)
				}
			}
			e.Close()
			<-ended
			if len(came) > 0 {
				t.Errorf("%d presentations too many", len(came))
			}
			source.Close()
		}
	}
}

func TestTokenList(t *testing.T) {
	list := []obtain.Token{{Field: []byte("Bearer a.b-c_d~e+f/g="), Thumbprint: [32]byte{1, 2, 255}}, {Field: []byte("Bearer x"), Thumbprint: [32]byte{3}}}
	raw := appendTokens(nil, list)
	got, ok := parseTokens(raw)
	if !ok || !slices.EqualFunc(got, list, func(a, b obtain.Token) bool { return a.Thumbprint == b.Thumbprint && bytes.Equal(a.Field, b.Field) }) {
		t.Errorf("%v %v", got, ok)
	}
	if got, ok := parseTokens(nil); !ok || got != nil {
		t.Errorf("%v %v", got, ok)
	}
	good := string(appendTokens(nil, list[1:]))
	for _, bad := range []string{
		good[:len(good)-1], good + "\n", " " + good, strings.Replace(good, " ", "", 1), strings.Replace(good, "Bearer", "bearer", 1), strings.Replace(good, "x\n", "\n", 1),
		strings.Replace(good, "x\n", "x y\n", 1), strings.Replace(good, "x\n", "x\r\n", 1), good[1:], "=" + good[1:], strings.Repeat(good, maxPresented+1),
		strings.Replace(good, "x\n", strings.Repeat("x", 17<<10)+"\n", 1),
	} {
		if got, ok := parseTokens([]byte(bad)); ok {
			t.Errorf("%.100q is taken: %v", bad, got)
		}
	}
	var p presented
	if !p.take(raw, [32]byte{3}) || string(p.field) != "Bearer x" {
		t.Errorf("%q", p.field)
	}
	if p.take([]byte("x"), [32]byte{3}) || string(p.field) != "Bearer x" {
		t.Errorf("what is malformed has replaced it by %q", p.field)
	}
	if !p.take(raw, [32]byte{4}) || p.field != nil {
		t.Errorf("another certificate's token is taken: %q", p.field)
	}
}

func FuzzTokenList(f *testing.F) {
	f.Add(appendTokens(nil, []obtain.Token{{Field: []byte("Bearer a.b.c"), Thumbprint: [32]byte{1}}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, ok := parseTokens(b)
		if ok && !bytes.Equal(appendTokens(nil, list), b) {
			t.Errorf("%q reads as %v", b, list)
		}
	})
}
