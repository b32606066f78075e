// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"errors"
	"io"
	"os"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http1"
)

// patience is how long the application may take before the exchange is
// registered as one that lasts, to be ended with what allowed it.
const patience = time.Second

var closeLine = []byte("Connection: close\r\n")

// maxInterim bounds the interim responses (1xx) to one request.
const maxInterim = 32

var errInterim = &http1.Error{Reason: flow.ReasonUpstream, Text: "too many interim responses"}

// errEnded ends an exchange about which everything has been said.
var errEnded = errors.New("the exchange has ended")

// errSwitched ends what is HTTP of a connection that the application has
// switched to another protocol.
var errSwitched = errors.New("the connection has switched protocols")

// response is the buffer of one exchange's answer.
type response struct {
	c       *call
	buf     []byte
	r, w    int
	lasting bool // registered
}

// respond relays responses up to the final one, and says whether the
// connection can go on.
func (c *call) respond(head bool) (keep bool, err error) {
	a := &response{c: c, buf: c.t.Buffer(), r: headroom, w: headroom}
	keep, err = a.relay(head)
	if len(a.buf) == netloop.BufferSize {
		c.t.Release(a.buf)
	}
	return keep, err
}

func (a *response) relay(head bool) (bool, error) {
	c := a.c
	for interim := 0; ; interim++ {
		err := a.readHead()
		if err == nil && interim > maxInterim {
			err = errInterim
		}
		if err != nil {
			if isFault(err) && !c.enforced() {
				a.passOn(err)
				return false, errEnded
			}
			c.broken(err)
			return false, errEnded
		}
		if c.resp.Switches() {
			return false, a.switched()
		}
		if !c.resp.Interim() {
			break
		}
		if c.old {
			a.r += c.resp.Len // HTTP/1.0 knows no interim responses
			continue
		}
		if err := a.write(a.buf[c.resp.Compact(a.buf, a.r, nil) : a.r+c.resp.Len]); err != nil {
			return false, err
		}
		a.r += c.resp.Len
	}
	body := c.resp.BodyFor(head)
	keep := !c.head.Close && !c.resp.Close && !body.UntilClose()
	var add []byte
	keep = keep && !c.pumping && !c.ending()
	if !keep && c.resp.Minor > 0 {
		add = closeLine
		c.resp.DropConnection()
	}
	at := a.r + c.resp.Len
	n, err := body.Next(a.buf[at:a.w])
	if err != nil {
		c.broken(err)
		return false, errEnded
	}
	if c.resp.HasLength {
		c.record(c.body.Content(), c.resp.ContentLength)
	} else {
		c.record(c.body.Content(), 0)
	}
	begin := c.resp.Compact(a.buf, a.r, add)
	if err := a.write(a.buf[begin : at+n]); err != nil {
		return false, err
	}
	a.r = at + n
	if err := a.rest(&body); err != nil {
		abort(c.client)
		return false, err
	}
	if a.lasting {
		c.watchRequests()
	}
	if a.r != a.w {
		// More than the response: whose it is cannot be said.
		_ = c.upstream.Close()
		c.upstream = nil
		return false, nil
	}
	c.used = true
	return keep, nil
}

// readHead receives and parses the head of a response.
func (a *response) readHead() error {
	var scan http1.Scan
	c := a.c
	_ = c.upstream.SetReadDeadline(time.Now().Add(patience))
	for {
		if a.w > a.r {
			n, err := scan.End(a.buf[a.r:a.w])
			if err != nil {
				return err
			}
			if n > 0 {
				return c.resp.Parse(a.buf[a.r : a.r+n])
			}
		}
		a.room()
		n, err := c.upstream.Read(a.buf[a.w:])
		a.w += n
		switch {
		case n > 0 || err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded) && !a.lasting:
			a.last()
			_ = c.upstream.SetReadDeadline(time.Now().Add(c.p.opt.ResponseTimeout))
		case errors.Is(err, io.EOF):
			return io.ErrUnexpectedEOF
		default:
			return err
		}
	}
}

// room makes sure that at least one more byte can be received.
func (a *response) room() {
	if a.r == a.w {
		a.r, a.w = headroom, headroom
	}
	if a.w < len(a.buf) {
		return
	}
	if a.r > headroom {
		a.w = headroom + copy(a.buf[headroom:], a.buf[a.r:a.w])
		a.r = headroom
		return
	}
	larger := make([]byte, headroom+http1.MaxHead+1)
	copy(larger, a.buf[:a.w])
	if len(a.buf) == netloop.BufferSize {
		a.c.t.Release(a.buf)
	}
	a.buf = larger
}

// last registers an exchange that takes its time.
func (a *response) last() {
	a.lasting = true
	a.c.keepHead()
	a.c.watch(false)
}

// rest relays the content that has not come with the head.
func (a *response) rest(body *http1.Body) error {
	c := a.c
	for !body.Done() {
		if !a.lasting {
			a.last()
		}
		a.room()
		_ = c.upstream.SetReadDeadline(time.Now().Add(c.p.opt.ResponseTimeout))
		n, err := c.upstream.Read(a.buf[a.w:])
		a.w += n
		if n > 0 {
			used, err := body.Next(a.buf[a.r:a.w])
			if err != nil {
				return err
			}
			if err := a.write(a.buf[a.r : a.r+used]); err != nil {
				return err
			}
			a.r += used
			continue
		}
		if errors.Is(err, io.EOF) && body.UntilClose() && !netloop.Truncated(c.upstream) {
			return nil
		}
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// write sends to the client and waits where it is slow.
func (a *response) write(b []byte) error {
	if _, err := a.c.client.Write(b); err != nil {
		return err
	}
	return netloop.Flushed(a.c.client, flushLimit)
}

// passOn carries a response that cannot be read, where the policy only
// observes, and all that follows.
func (a *response) passOn(err error) {
	c := a.c
	if fault, ok := errors.AsType[*http1.Error](err); ok {
		c.refuse(flow.StageUpstream, flow.ReasonUpstream, "the response cannot be read: "+fault.Text)
	}
	c.record(0, 0)
	if a.write(a.buf[a.r:a.w]) != nil {
		return
	}
	if c.pumping {
		// The other direction is under way: from here on to its end, too.
		c.body = http1.UntilClose()
		a.passRest()
		return
	}
	c.relayRest()
}

// switched tells the client that the application has switched protocols as
// it was asked to, with what that says first in the new one. From here on
// the exchange lasts.
func (a *response) switched() error {
	c := a.c
	if !a.lasting {
		a.last()
	}
	if c.reason != flow.ReasonOK {
		return errEnded
	}
	c.record(0, 0)
	c.resp.DropConnection()
	begin := c.resp.Compact(a.buf, a.r, []byte(http1.SwitchLines))
	if err := a.write(a.buf[begin:a.w]); err != nil {
		return err
	}
	return errSwitched
}

// passRest carries what comes from the application, up to its end, and waits
// for the other direction.
func (a *response) passRest() {
	c := a.c
	for {
		_ = c.upstream.SetReadDeadline(time.Now().Add(c.p.opt.RelayIdle))
		n, err := c.upstream.Read(a.buf)
		if n > 0 && a.write(a.buf[:n]) != nil {
			return
		}
		if errors.Is(err, io.EOF) && !netloop.Truncated(c.upstream) {
			break
		}
		if n == 0 && err != nil {
			abort(c.client)
			return
		}
	}
	_ = c.client.CloseWrite()
	for c.pumping {
		if c.t.Wait(&c.pumped) != nil {
			return
		}
	}
}
