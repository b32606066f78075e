// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"errors"
	"io"
	"os"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http1"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http2"
)

// forward begins the request at the application.
func (x *exchange) forward() error {
	if x.s.Over() {
		return errNoClient
	}
	x.s.Ended = x.onClient
	app, err := x.c.application(x.t, x.req.Host)
	if err != nil {
		return err
	}
	deadline := time.Now().Add(x.c.p.opt.ConnectTimeout)
	if err := app.Await(x.t, deadline); err != nil {
		if app.Full() {
			return &refusal{flow.StageUpstream, flow.ReasonOverload, "the application takes no more streams"}
		}
		return &refusal{flow.StageUpstream, flow.ReasonUpstream, "the application does not answer in HTTP/2"}
	}
	if x.s.Over() {
		return errNoClient
	}
	end := x.s.Head().End
	if x.up, err = app.Open(x.t, x.fields(), end, deadline); err != nil {
		return err
	}
	x.up.Ended = x.onApp
	if !end {
		x.pumping = true
		x.t.Go(x.pump)
	}
	return nil
}

// fields is the header list as it goes on: as received, less the fields that
// only we may write, with the one that tells who calls.
func (x *exchange) fields() []http2.Field {
	x.list = x.list[:0]
	authority := x.head.Authority // "" where it could not be read
	for _, f := range x.s.Head().Fields {
		switch {
		case f.Name == ":authority":
			authority = ""
		case authority != "" && !strings.HasPrefix(f.Name, ":"):
			x.list = append(x.list, http2.Field{Name: ":authority", Value: authority})
			authority = ""
		}
		if !http1.IsIdentity([]byte(f.Name)) && (f.Name != "host" || x.head.Authority == "") {
			x.list = append(x.list, f)
		}
	}
	if x.c.h2.cert != "" {
		x.list = append(x.list, http2.Field{Name: "x-forwarded-client-cert", Value: x.c.h2.cert})
	}
	if x.auth != nil {
		x.list = append(x.list, http2.Field{Name: "authorization", Value: string(x.auth), Sensitive: true})
	}
	return x.list
}

// clientEnded takes the request back from the application where the client
// took it back.
func (x *exchange) clientEnded() {
	if x.up != nil && !x.s.Orderly() {
		x.up.Reset(http2.CodeCancel, errNoClient)
	}
}

// appEnded has nobody wait for content that the application does not take.
func (x *exchange) appEnded() { _ = x.s.SetReadDeadline(time.Unix(1, 0)) }

// pump carries the content of the request while the response may already
// come.
func (x *exchange) pump(t *netloop.Task) {
	serial, up := x.serial, x.up
	err := x.pumpBody(t)
	if x.serial != serial {
		return // the engine is closing
	}
	if err != nil {
		x.fault = err
		up.Reset(http2.CodeCancel, err) // the application must not take it for complete
	}
	x.pumping = false
	x.pumped.Broadcast()
}

func (x *exchange) pumpBody(t *netloop.Task) error {
	serial, s, up := x.serial, x.s, x.up
	held := x.held
	x.held, x.received = nil, int64(len(held))
	for len(held) > 0 {
		n := min(len(held), streamLimit)
		if _, err := up.Write(held[:n]); err != nil {
			return err
		}
		held = held[n:]
		if err := up.Flushed(streamLimit); err != nil || x.serial != serial {
			return err
		}
	}
	for {
		if err := up.Flushed(streamLimit); err != nil || x.serial != serial {
			return err
		}
		_ = s.SetReadDeadline(x.moved.Add(x.idle()))
		err := s.AwaitRead()
		switch {
		case x.serial != serial || up.Over():
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded) && time.Since(x.moved) < x.idle():
			continue
		case err != nil:
			return err
		}
		buf := t.Buffer()
		n, err := s.Read(buf)
		if n > 0 {
			x.moved = time.Now()
			if err = x.measure(n, false); err == nil {
				_, err = up.Write(buf[:n])
			}
		}
		t.Release(buf)
		if errors.Is(err, io.EOF) {
			return x.endBody()
		}
		if err != nil {
			return err
		}
	}
}

// endBody ends the request as the client ended it.
func (x *exchange) endBody() error {
	if err := x.measure(0, true); err != nil {
		return err
	}
	trailers := x.s.Trailers()
	if trailers == nil {
		return x.up.CloseWrite()
	}
	if err := http2.CheckTrailers(trailers, &x.head); err != nil && (x.enforced() || trailers.Long) {
		return err
	}
	return x.up.SendTrailers(trailers.Fields)
}

// idle is how long neither side may say anything.
func (x *exchange) idle() time.Duration {
	if x.head.GRPC {
		return x.c.p.opt.RelayIdle // a subscription may have nothing to say
	}
	return x.c.p.opt.ResponseTimeout
}

// await waits for what the application says next, a header list or content.
// An exchange that takes its time is registered.
func (x *exchange) await(head bool) (h http2.Head, err error) {
	for {
		until := x.moved.Add(x.idle())
		if p := x.patience(); !p.IsZero() {
			until = earlier(until, p)
		}
		_ = x.up.SetReadDeadline(until)
		if head {
			h, err = x.up.ReadHead()
		} else {
			err = x.up.AwaitRead()
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return h, err
		}
		if err := x.lasts(time.Now()); err != nil {
			return h, err
		}
		if time.Since(x.moved) >= x.idle() {
			return h, err
		}
	}
}

// lasts registers the exchange if it is time.
func (x *exchange) lasts(now time.Time) error {
	if x.handle == 0 && now.Sub(x.req.Time) >= patience && !x.watch() {
		return errEnded
	}
	return nil
}

// respond relays the response.
func (x *exchange) respond() error {
	for interim := 0; ; interim++ {
		h, err := x.await(true)
		if err == nil && interim > maxInterim {
			err = errInterim
		}
		if err != nil {
			return err
		}
		if err := x.resp.Parse(&h, x.req.Method); err != nil {
			return err
		}
		if err := x.c.h2.session.Room(x.t); err != nil {
			return err
		}
		x.moved = time.Now()
		if x.resp.Interim() {
			if err := x.s.SendInterim(h.Fields); err != nil {
				return err
			}
			continue
		}
		x.record()
		if err := x.s.SendHead(h.Fields, h.End); err != nil {
			return err
		}
		x.answered, x.complete = true, h.End
		if !h.End {
			if err := x.respondBody(); err != nil {
				return err
			}
		}
		return x.rest()
	}
}

// rest waits for the rest of the request, which the application may still
// take after its response.
func (x *exchange) rest() error {
	for x.pumping {
		if err := x.t.WaitUntil(&x.pumped, x.patience()); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if err := x.lasts(time.Now()); err != nil {
			return err
		}
	}
	return nil
}

// flushed waits until at most limit bytes of the response wait for the
// client's window.
func (x *exchange) flushed(limit int) error {
	for {
		_ = x.s.SetWriteDeadline(x.patience())
		err := x.s.Flushed(limit)
		_ = x.s.SetWriteDeadline(time.Time{})
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if err := x.lasts(time.Now()); err != nil {
			return err
		}
	}
}

// patience is when an exchange lasts, the zero time once it is registered.
func (x *exchange) patience() time.Time {
	if x.handle != 0 {
		return time.Time{}
	}
	return x.req.Time.Add(patience)
}

func (x *exchange) respondBody() error {
	for {
		if _, err := x.await(false); err != nil {
			return err
		}
		buf := x.t.Buffer()
		n, err := x.up.Read(buf)
		if n > 0 {
			_, err = x.s.Write(buf[:n])
		}
		x.t.Release(buf)
		x.sent += int64(n)
		if length := x.resp.ContentLength; length >= 0 && (x.sent > length || errors.Is(err, io.EOF) && x.sent < length) {
			return http2.ErrContent
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = x.flushed(streamLimit)
		}
		if err != nil {
			return err
		}
		x.moved = time.Now()
		if err := x.lasts(x.moved); err != nil {
			return err
		}
	}
	trailers := x.up.Trailers()
	var err error
	if trailers == nil {
		err = x.s.CloseWrite()
	} else if err = http2.CheckTrailers(trailers, nil); err == nil {
		err = x.s.SendTrailers(trailers.Fields)
	}
	if err != nil {
		return err
	}
	x.complete = true
	return x.flushed(0) // and can be ended so long
}
