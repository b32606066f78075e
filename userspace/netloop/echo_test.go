// SPDX-License-Identifier: Apache-2.0

package netloop_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
)

// echo sends back what it receives, and the end of it.
func echo(t *netloop.Task, c *netloop.Conn) {
	echoStream(t, c)
}

func echoStream(t *netloop.Task, s netloop.Stream) error {
	buf := t.Buffer()
	defer t.Release(buf)
	for {
		n, err := s.Read(buf)
		if errors.Is(err, io.EOF) {
			return s.CloseWrite()
		}
		if err != nil {
			return err
		}
		if _, err := s.Write(buf[:n]); err != nil {
			return err
		}
		if err := netloop.Flushed(s, 64<<10); err != nil {
			return err
		}
	}
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

// roundTrip sends data, ends the sending side and wants the same data back and then the end.
func roundTrip(t testing.TB, c netloop.Stream, data []byte) {
	t.Helper()
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(data)
		if err == nil {
			err = c.CloseWrite()
		}
		sent <- err
	}()
	got := sha256.New()
	n, err := io.Copy(got, c)
	if err != nil {
		t.Errorf("read after %d bytes: %v", n, err)
	}
	if err := <-sent; err != nil {
		t.Errorf("write: %v", err)
	}
	if want := sha256.Sum256(data); !bytes.Equal(got.Sum(nil), want[:]) {
		t.Errorf("%d bytes came back of %d, or others", n, len(data))
	}
}

func TestEcho(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		addr := b.serve(echo)
		for _, size := range []int{0, 1, 1000, 32 << 10, 64<<10 + 1, 20 << 20} {
			roundTrip(t, dial(t, addr), random(size))
		}
	})
}

func TestEchoTLS(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		addr := b.serve(func(t *netloop.Task, c *netloop.Conn) {
			s := tls.Server(c, serverTLS())
			if s.Handshake() == nil {
				_ = echoStream(t, s)
			}
		})
		for _, size := range []int{0, 1, 1000, 64<<10 + 1, 20 << 20} {
			roundTrip(t, tls.Client(dial(t, addr), clientTLS()), random(size))
		}
	})
}
