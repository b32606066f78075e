// SPDX-License-Identifier: Apache-2.0

package netloop_test

import (
	"io"
	"testing"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
)

// faulty panics when it is written to.
type faulty struct{ opaque }

func (faulty) Write([]byte) (int, error) { panic("faulty stream") }

func TestRelayPanicEndsBothDirections(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		to := b.serve(echo)
		c, errs := b.handled(func(task *netloop.Task, c *netloop.Conn) error {
			u, err := task.Adopt(connecting(t, to))
			if err != nil {
				return err
			}
			// The direction towards c is the one that Relay runs in a task of its own.
			_, _, err = netloop.Relay(task, faulty{opaque{c, c.CloseWrite, c.Flushed}}, u, netloop.RelayOptions{})
			c.Abort()
			return err
		})
		c.Write([]byte("x"))
		wantErr(t, errs, netloop.ErrPanicked)
		if _, err := io.ReadAll(c); err == nil {
			t.Error("the client saw an orderly end")
		}
		if n := b.Stats().Panics; n != 1 {
			t.Errorf("%d panics are counted", n)
		}
	})
}
