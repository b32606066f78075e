// SPDX-License-Identifier: Apache-2.0

package introspect

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/userspace/token"
)

func TestAuthorization(t *testing.T) {
	dir := t.TempDir()
	file := func(content string, mode os.FileMode) string {
		p := filepath.Join(dir, "f")
		os.Remove(p)
		if err := os.WriteFile(p, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		return p
	}
	for content, want := range map[string]string{
		"id:secret": "Basic aWQ6c2VjcmV0", "a b:c:d%\n": "Basic YStiOmMlM0FkJTI1", "Bearer abc\r\n": "Bearer abc", "id:": "Basic aWQ6",
	} {
		if got, err := authorization(file(content, 0o600)); got != want || err != nil {
			t.Errorf("%q: %q %v", content, got, err)
		}
	}
	for _, content := range []string{"", "\n", "secret", ":secret", "id:secret\nmore", "id:\x00", strings.Repeat("x:", maxCredentials)} {
		if got, err := authorization(file(content, 0o600)); err == nil || strings.Contains(err.Error(), "secret\n") {
			t.Errorf("%q: %q %v", content, got, err)
		}
	}
	if _, err := authorization(file("id:secret", 0o644)); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("for everybody: %v", err)
	}
	if err := Check(filepath.Join(dir, "none")); err == nil {
		t.Error("a file that is not there")
	}
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Check(pipe); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a pipe: %v", err)
	}
}

func TestAsk(t *testing.T) {
	credentials := filepath.Join(t.TempDir(), "credentials")
	if err := os.WriteFile(credentials, []byte("id:secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	var answer func(http.ResponseWriter, *http.Request)
	release := make(chan struct{})
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { answer(w, r) }))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	defer s.Close()
	defer close(release)
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	c := New(roots)
	defer c.Close()
	json := func(body string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json;charset=UTF-8")
			io.WriteString(w, body) //nolint:errcheck // the client has gone
		}
	}
	for _, x := range []struct {
		name   string
		answer func(http.ResponseWriter, *http.Request)
		why    string
	}{
		{"good", json(`{"active":true}`), ""},
		{"long", json(strings.Repeat(" ", token.MaxAnswer+1)), "the answer is over"},
		{"401", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) }, "the answer is 401"},
		{"HTML", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html>") }, "not application/json"}, //nolint:errcheck // as above
		{"elsewhere", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/other", http.StatusTemporaryRedirect)
		}, "it redirects"},
		{"compressed", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			json("x")(w, r)
		}, "compressed"},
	} {
		answer = x.answer
		body, err := c.Ask(t.Context(), s.URL, credentials, "tok")
		if x.why == "" && (err != nil || string(body) != `{"active":true}`) || x.why != "" && (err == nil || !strings.Contains(err.Error(), x.why)) {
			t.Errorf("%s: %q %v", x.name, body, err)
		}
		if err != nil && (strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "tok")) {
			t.Errorf("%s: the error tells too much: %v", x.name, err)
		}
	}
	if _, err := New(nil).Ask(t.Context(), s.URL, credentials, "tok"); err == nil {
		t.Error("a server that proves nothing was asked")
	}
	// One that does not answer holds up no more than its slots.
	answer = func(http.ResponseWriter, *http.Request) { <-release }
	ctx, cancel := context.WithCancel(t.Context())
	for range AtOnce {
		go c.Ask(ctx, s.URL, credentials, "tok") //nolint:errcheck // it is cancelled
	}
	for late := time.Now().Add(10 * time.Second); len(c.slots) < AtOnce; time.Sleep(time.Millisecond) {
		if time.Now().After(late) {
			t.Fatalf("%d questions", len(c.slots))
		}
	}
	if _, err := c.Ask(t.Context(), s.URL, credentials, "tok"); !errors.Is(err, ErrBusy) {
		t.Errorf("one more: %v", err)
	}
	cancel()
}
