// SPDX-License-Identifier: Apache-2.0

package keys

import (
	"bytes"
	"compress/gzip"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const issuer = "shop/sso"

// delivery is one call of Options.Deliver.
type delivery struct {
	issuer   string
	document string
	fetched  time.Time
	err      error
	hits     int64 // of the server by then
}

// server is an issuer's HTTPS endpoint whose handler a test may replace.
type server struct {
	*httptest.Server
	handler atomic.Pointer[http.HandlerFunc]
	hits    atomic.Int64
}

func newServer(t *testing.T, h http.HandlerFunc) *server {
	t.Helper()
	s := &server{}
	s.handler.Store(&h)
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.hits.Add(1)
		(*s.handler.Load())(w, r)
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func (s *server) set(h http.HandlerFunc) { s.handler.Store(&h) }

func (s *server) roots() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(s.Certificate())
	return p
}

func text(body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, body) }
}

func newFetcher(t *testing.T, s *server, opt Options) (*Fetcher, chan delivery) {
	t.Helper()
	got := make(chan delivery, 64)
	opt.Deliver = func(issuer string, document []byte, fetched time.Time, err error) {
		d := delivery{issuer: issuer, document: string(document), fetched: fetched, err: err}
		if s != nil {
			d.hits = s.hits.Load()
		}
		got <- d
	}
	if s != nil {
		opt.RootCAs = s.roots()
	}
	f := New(opt)
	t.Cleanup(f.Close)
	return f, got
}

func next(t *testing.T, got chan delivery) delivery {
	t.Helper()
	select {
	case d := <-got:
		return d
	case <-time.After(20 * time.Second):
		t.Fatal("nothing was delivered")
		return delivery{}
	}
}

func TestFetch(t *testing.T) {
	big := strings.Repeat("x", MaxDocument)
	other := newServer(t, text("stolen"))
	tests := []struct {
		name    string
		handler http.HandlerFunc
		want    string
		err     string
	}{
		{"a document", text("one"), "one", ""},
		{"just within bounds", text(big), big, ""},
		{"declared too large", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(MaxDocument+1))
			fmt.Fprint(w, big, "x")
		}, "", "over 262144 bytes"},
		{"endless", func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := fmt.Fprint(w, big); err != nil {
					return
				}
			}
		}, "", "over 262144 bytes"},
		{"dripping", func(w http.ResponseWriter, r *http.Request) {
			tick := time.NewTicker(20 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-r.Context().Done():
					return
				case <-tick.C:
					fmt.Fprint(w, " ")
					w.(http.Flusher).Flush()
				}
			}
		}, "", "deadline exceeded"},
		{"silent", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "", "deadline exceeded"},
		{"compressed", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(w)
			z.Write(bytes.Repeat([]byte{' '}, 1<<20))
			z.Close()
		}, "", "compressed"},
		{"not found", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(404) }, "", "the answer is 404"},
		{"not modified, unasked", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(304) }, "", "the answer is 304"},
		{"redirect within the host", func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/" {
				http.Redirect(w, r, "/keys", http.StatusFound)
				return
			}
			fmt.Fprint(w, "moved")
		}, "moved", ""},
		{"redirect to another host", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, other.URL, http.StatusFound)
		}, "", "redirects to another host"},
		{"redirect to plaintext", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://"+r.Host+"/", http.StatusFound)
		}, "", "redirects to another host"},
		{"redirect for ever", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/", http.StatusFound)
		}, "", "redirects"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := newServer(t, test.handler)
			o := Options{}
			if test.err == "deadline exceeded" {
				o.Timeout = time.Second
			}
			f, got := newFetcher(t, s, o)
			if err := f.SetSources([]Source{{Issuer: issuer, URL: s.URL}}); err != nil {
				t.Fatal(err)
			}
			d := next(t, got)
			if test.err == "" {
				if d.err != nil || d.document != test.want || d.issuer != issuer || d.fetched.IsZero() {
					t.Fatalf("got %d bytes at %v, error %v", len(d.document), d.fetched, d.err)
				}
				return
			}
			if d.err == nil || !strings.Contains(d.err.Error(), test.err) || d.document != "" || !d.fetched.IsZero() {
				t.Fatalf("got %d bytes, error %v, want one with %q", len(d.document), d.err, test.err)
			}
		})
	}
	if other.hits.Load() != 0 {
		t.Fatal("the other host was asked")
	}
}

func TestFetchWantsTrustedCertificate(t *testing.T) {
	s := newServer(t, text("one"))
	f, got := newFetcher(t, nil, Options{RootCAs: x509.NewCertPool()})
	if err := f.SetSources([]Source{{Issuer: issuer, URL: s.URL}}); err != nil {
		t.Fatal(err)
	}
	if d := next(t, got); d.err == nil || !strings.Contains(d.err.Error(), "certificate") {
		t.Fatalf("got %v", d.err)
	}
}

func TestDownKeepsTheOldDocument(t *testing.T) {
	s := newServer(t, text("one"))
	f, got := newFetcher(t, s, Options{Interval: 50 * time.Millisecond, LeastInterval: 10 * time.Millisecond})
	if err := f.SetSources([]Source{{Issuer: issuer, URL: s.URL}}); err != nil {
		t.Fatal(err)
	}
	first := next(t, got)
	s.set(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) })
	d := next(t, got)
	for d.err == nil {
		first, d = d, next(t, got)
	}
	if d.document != "" || !d.fetched.Equal(first.fetched) {
		t.Fatalf("a failure delivered %q of %v, last good one %v", d.document, d.fetched, first.fetched)
	}
	if st := f.Status(); len(st) != 1 || !strings.Contains(st[0].Problem, "503") || !st[0].Fetched.Equal(first.fetched) || st[0].From != s.URL {
		t.Fatalf("status %+v", st)
	}
	s.set(text("two"))
	for d.err != nil {
		d = next(t, got)
	}
	if d.document != "two" || f.Status()[0].Problem != "" {
		t.Fatalf("after recovery: %q, status %+v", d.document, f.Status())
	}
}

func TestConditionalFetchRenewsTheAge(t *testing.T) {
	var conditional atomic.Int64
	s := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("If-None-Match") == `"v1"` {
			conditional.Add(1)
			w.WriteHeader(304)
			return
		}
		w.Header().Set("ETag", `"v1"`)
		fmt.Fprint(w, "one")
	})
	f, got := newFetcher(t, s, Options{Interval: 20 * time.Millisecond, LeastInterval: time.Millisecond})
	if err := f.SetSources([]Source{{Issuer: issuer, URL: s.URL}}); err != nil {
		t.Fatal(err)
	}
	first, second := next(t, got), next(t, got)
	if second.document != "one" || !second.fetched.After(first.fetched) || conditional.Load() == 0 {
		t.Fatalf("second delivery %q at %v after %v, %d conditional", second.document, second.fetched, first.fetched, conditional.Load())
	}
}

func TestRefreshIsRateLimited(t *testing.T) {
	const least = 300 * time.Millisecond
	s := newServer(t, text("one"))
	f, got := newFetcher(t, s, Options{Interval: time.Hour, LeastInterval: least})
	if err := f.SetSources([]Source{{Issuer: issuer, URL: s.URL}}); err != nil {
		t.Fatal(err)
	}
	first := next(t, got)
	for range 500 {
		if err := f.Refresh(issuer); err != nil {
			t.Fatal(err)
		}
	}
	second := next(t, got)
	if gap := second.fetched.Sub(first.fetched); gap < least {
		t.Fatalf("fetched again after %v", gap)
	}
	if second.hits != 2 {
		t.Fatalf("%d fetches for 500 refreshes, want 2", second.hits)
	}
	if err := f.Refresh("shop/none"); err == nil {
		t.Fatal("an unknown issuer was refreshed")
	}
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.json")
	f, got := newFetcher(t, nil, Options{Poll: 5 * time.Millisecond, Interval: time.Hour, LeastInterval: time.Hour})
	write := func(body string) {
		t.Helper()
		if err := os.WriteFile(path+".new", []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.SetSources([]Source{{Issuer: issuer, File: path}}); err != nil {
		t.Fatal(err)
	}
	if d := next(t, got); d.err == nil || !strings.Contains(d.err.Error(), "no such file") {
		t.Fatalf("absent: %+v", d)
	}
	write("one")
	if d := next(t, got); d.document != "one" {
		t.Fatalf("appeared: %+v", d)
	}
	write("two")
	if d := next(t, got); d.document != "two" {
		t.Fatalf("replaced: %+v", d)
	}
	write(strings.Repeat("x", MaxDocument+1))
	if d := next(t, got); d.err == nil || d.fetched.IsZero() {
		t.Fatalf("too large: %+v", d)
	}
	write("three")
	if d := next(t, got); d.document != "three" {
		t.Fatalf("mended: %+v", d)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if d := next(t, got); d.err == nil {
		t.Fatalf("removed: %+v", d)
	}
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if d := next(t, got); d.err == nil || !strings.Contains(d.err.Error(), "not a regular file") {
		t.Fatalf("a pipe: %+v", d)
	}
}

func TestSwappedLink(t *testing.T) {
	dir := t.TempDir()
	for _, v := range []string{"v1", "v2"} {
		if err := os.Mkdir(filepath.Join(dir, v), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, v, "keys"), []byte(v), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	link := func(to string) {
		t.Helper()
		if err := os.Symlink(to, filepath.Join(dir, "new")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, "data")); err != nil {
			t.Fatal(err)
		}
	}
	link("v1")
	f, got := newFetcher(t, nil, Options{Poll: 5 * time.Millisecond})
	if err := f.SetSources([]Source{{Issuer: issuer, File: filepath.Join(dir, "data", "keys")}}); err != nil {
		t.Fatal(err)
	}
	if d := next(t, got); d.document != "v1" {
		t.Fatalf("got %+v", d)
	}
	link("v2")
	if d := next(t, got); d.document != "v2" {
		t.Fatalf("got %+v", d)
	}
}

func TestSourcesAndReplay(t *testing.T) {
	f, got := newFetcher(t, nil, Options{})
	good := []Source{{Issuer: issuer, Document: []byte("one")}}
	if err := f.SetSources(good); err != nil {
		t.Fatal(err)
	}
	if d := next(t, got); d.document != "one" {
		t.Fatalf("got %+v", d)
	}
	f.Replay()
	if d := next(t, got); d.document != "one" {
		t.Fatalf("replayed %+v", d)
	}
	if err := f.SetSources([]Source{{Issuer: issuer, Document: []byte("two")}, {Issuer: issuer, Document: []byte("three")}}); err == nil {
		t.Fatal("two sources of one issuer were taken")
	}
	if st := f.Status(); len(st) != 1 || st[0].Attempts != 1 || st[0].From != "policy" {
		t.Fatalf("a refused set changed something: %+v", st)
	}
	if err := f.SetSources(good); err != nil || f.Status()[0].Attempts != 1 {
		t.Fatalf("the same set was fetched again: %v, %+v", err, f.Status())
	}
	if err := f.SetSources(nil); err != nil || len(f.Status()) != 0 {
		t.Fatalf("not emptied: %v, %+v", err, f.Status())
	}
}

func TestCheck(t *testing.T) {
	f, _ := newFetcher(t, nil, Options{AllowHost: func(h string) bool { return h == "sso.example" || h == "127.0.0.1" }})
	tests := []struct {
		name   string
		source Source
		ok     bool
	}{
		{"https", Source{URL: "https://sso.example/jwks"}, true},
		{"http", Source{URL: "http://sso.example/jwks"}, false},
		{"file URL", Source{URL: "file:///etc/shadow"}, false},
		{"with a user", Source{URL: "https://u:p@sso.example/jwks"}, false},
		{"no host", Source{URL: "https:///jwks"}, false},
		{"loopback in the node's own policy", Source{URL: "https://127.0.0.1/jwks"}, true},
		{"nothing", Source{}, false},
		{"two", Source{URL: "https://sso.example", File: "/keys"}, false},
		{"relative file", Source{File: "keys"}, false},
		{"file", Source{File: "/keys"}, true},
		{"document too large", Source{Document: make([]byte, MaxDocument+1)}, false},
		{"tenant, allowed host", Source{URL: "https://sso.example/jwks", Tenant: true}, true},
		{"tenant, other host", Source{URL: "https://evil.example/jwks", Tenant: true}, false},
		{"tenant, allowed name of loopback", Source{URL: "https://127.0.0.1/jwks", Tenant: true}, false},
		{"tenant, file", Source{File: "/keys", Tenant: true}, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			test.source.Issuer = issuer
			if err := f.Check(test.source); (err == nil) != test.ok {
				t.Fatalf("got %v", err)
			}
		})
	}
}

// A tenant's host is allowed by name; what the name resolves to is judged
// when it is connected to.
func TestTenantNameThatResolvesToLoopback(t *testing.T) {
	s := newServer(t, text("secret"))
	_, port, _ := strings.Cut(strings.TrimPrefix(s.URL, "https://"), ":")
	f, got := newFetcher(t, s, Options{AllowHost: func(string) bool { return true }})
	if err := f.SetSources([]Source{{Issuer: issuer, URL: "https://localhost:" + port, Tenant: true}}); err != nil {
		t.Fatal(err)
	}
	if d := next(t, got); d.err == nil || !strings.Contains(d.err.Error(), "tenant") {
		t.Fatalf("got %+v", d)
	}
	if s.hits.Load() != 0 {
		t.Fatal("loopback was asked")
	}
}

func TestJudgeAddress(t *testing.T) {
	for addr, ok := range map[string]bool{
		"203.0.113.7": true, "10.0.0.1": true, "2001:db8::1": true, "fd00::1": true,
		"127.0.0.1": false, "127.9.9.9": false, "::1": false, "0.0.0.0": false, "0.1.2.3": false, "::": false,
		"169.254.169.254": false, "fe80::1%eth0": false, "fd00:ec2::254": false, "168.63.129.16": false,
		"100.100.100.200": false, "224.0.0.1": false, "255.255.255.255": false, "ff02::1": false,
		"::ffff:127.0.0.1": false, "::ffff:169.254.169.254": false, "64:ff9b::7f00:1": false, "2002:7f00:1::": false,
	} {
		if err := judgeAddress(netip.MustParseAddr(addr)); (err == nil) != ok {
			t.Errorf("%s: %v", addr, err)
		}
	}
}

func TestCloseEndsASilentFetch(t *testing.T) {
	asked := make(chan struct{}, 1)
	s := newServer(t, func(_ http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		<-r.Context().Done()
	})
	f, got := newFetcher(t, s, Options{Timeout: time.Hour})
	if err := f.SetSources([]Source{{Issuer: issuer, URL: s.URL}}); err != nil {
		t.Fatal(err)
	}
	<-asked
	done := make(chan struct{})
	go func() { f.Close(); close(done) }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("Close waits for a server that is silent")
	}
	if len(got) != 0 {
		t.Fatal("something was delivered after the end")
	}
	if err := f.SetSources(nil); err == nil {
		t.Fatal("a closed fetcher took sources")
	}
}
