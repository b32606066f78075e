// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/testenv"
)

// opensslTime bounds a run of openssl on a busy machine.
const opensslTime = 30 * time.Second

func openssl(t *testing.T) (path string) {
	t.Helper()
	return testenv.Program(t, "openssl")
}

// pemFiles writes the leaf of an identity, its chain, its key and the roots
// for openssl.
func (p *pair) pemFiles(t *testing.T, id string) (cert, chain, key, roots string) {
	t.Helper()
	leaf, err := p.leaves.Get(id)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(leaf.Certificate.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name, kind string, blocks ...[]byte) string {
		var b bytes.Buffer
		for _, der := range blocks {
			if err := pem.Encode(&b, &pem.Block{Type: kind, Bytes: der}); err != nil {
				t.Fatal(err)
			}
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return write("cert", "CERTIFICATE", leaf.Certificate.Certificate[0]), write("chain", "CERTIFICATE", leaf.Certificate.Certificate...),
		write("key", "PRIVATE KEY", pkcs8), write("roots", "CERTIFICATE", p.ca.Trust().Roots...)
}

// acceptOne answers one connection with a line and reports what the
// handshake found.
func acceptOne(t *testing.T, config *tls.Config) (address string, result <-chan outcome) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	done := make(chan outcome, 1)
	go func() {
		raw, err := listener.Accept()
		if err != nil {
			done <- outcome{serverErr: err}
			return
		}
		defer raw.Close()
		_ = raw.SetDeadline(time.Now().Add(opensslTime))
		c := tls.Server(raw, config)
		o := outcome{serverErr: c.Handshake()}
		if o.serverErr == nil {
			o.server = c.ConnectionState()
			_, o.serverErr = io.WriteString(c, "hello from go\n")
			c.Close()
		}
		done <- o
	}()
	return listener.Addr().String(), done
}

func TestOpenSSLClient(t *testing.T) {
	program := openssl(t)
	p := newPair(t, 0)
	_, chain, key, roots := p.pemFiles(t, testID)
	base := []string{"s_client", "-quiet", "-no_ign_eof", "-alpn", "h2", "-servername", ServerName(otherID), "-CAfile", roots, "-verify_return_error"}
	for name, c := range map[string]struct {
		args   []string
		reason flow.Reason
	}{
		"mutual":         {[]string{"-tls1_3", "-cert", chain, "-key", key}, flow.ReasonOK},
		"no certificate": {[]string{"-tls1_3"}, flow.ReasonCertMissing},
		"TLS 1.2":        {[]string{"-tls1_2", "-cert", chain, "-key", key}, flow.ReasonTLSVersion},
	} {
		t.Run(name, func(t *testing.T) {
			address, result := acceptOne(t, p.server)
			ctx, cancel := context.WithTimeout(t.Context(), opensslTime)
			defer cancel()
			cmd := exec.CommandContext(ctx, program, append(append([]string{}, base...), append(c.args, "-connect", address)...)...)
			stdin, err := cmd.StdinPipe() // open until openssl ends: at its end it would hang up
			if err != nil {
				t.Fatal(err)
			}
			defer stdin.Close()
			out, err := cmd.CombinedOutput()
			o := <-result
			if reason, _ := ReasonOf(o.serverErr); reason != c.reason {
				t.Fatalf("server: %v; want %q\nopenssl (%v): %s", o.serverErr, c.reason, err, out)
			}
			if c.reason != flow.ReasonOK {
				if strings.Contains(string(out), "hello from go") {
					t.Errorf("the refused client was answered: %s", out)
				}
				return
			}
			if !strings.Contains(string(out), "hello from go") {
				t.Errorf("openssl (%v): %s", err, out)
			}
			if peer, err := p.verifier.PeerOf(o.server, RoleClient); err != nil || peer.ID != testID {
				t.Errorf("%+v, %v", peer, err)
			}
		})
	}
}

func TestOpenSSLServer(t *testing.T) {
	program := openssl(t)
	p := newPair(t, 0)
	cert, _, key, roots := p.pemFiles(t, otherID)
	ctx, cancel := context.WithTimeout(t.Context(), opensslTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "s_server", "-accept", "127.0.0.1:0", "-tls1_3", "-alpn", "h2", "-cert", cert, "-key", key,
		"-CAfile", roots, "-Verify", "4", "-verify_return_error", "-rev", "-naccept", "1")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cancel()
		_ = cmd.Wait()
	}()
	address := ""
	lines := bufio.NewScanner(stdout)
	for address == "" && lines.Scan() {
		address, _ = strings.CutPrefix(lines.Text(), "ACCEPT ")
		if !strings.HasPrefix(lines.Text(), "ACCEPT ") {
			address = ""
		}
	}
	if address == "" {
		t.Fatalf("openssl did not listen: %s", stderr.String())
	}
	go func() {
		for lines.Scan() { // so that openssl never waits for its reader
		}
	}()
	config, err := ClientConfig(p.options())
	if err != nil {
		t.Fatal(err)
	}
	dialer := tls.Dialer{NetDialer: &net.Dialer{Timeout: opensslTime}, Config: config}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(opensslTime))
	if _, err := io.WriteString(conn, "abc\n"); err != nil {
		t.Fatal(err)
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) || answer != "cba\n" {
		t.Fatalf("%q, %v\n%s", answer, err, stderr.String())
	}
	if peer, err := p.verifier.PeerOf(conn.(*tls.Conn).ConnectionState(), RoleServer); err != nil || peer.ID != otherID {
		t.Errorf("%+v, %v", peer, err)
	}
}
