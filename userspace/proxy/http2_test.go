// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/testenv"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// unencrypted is HTTP/2 without TLS, and HTTP/1 for who speaks it.
func unencrypted(http1 bool) *http.Protocols {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	p.SetHTTP1(http1)
	return p
}

// app2 is app for a server that speaks HTTP/2 as well.
func (n *node) app2(h http.Handler, ports ...uint16) {
	n.t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		n.t.Fatal(err)
	}
	s := &http.Server{Handler: h, Protocols: unencrypted(true)}
	go s.Serve(ln)
	n.t.Cleanup(func() { s.Close() })
	n.at(ln.Addr().String(), ports...)
}

func http2Client(t testing.TB) *http.Client {
	tr := &http.Transport{Protocols: unencrypted(false), DisableCompression: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second}
}

// TestHTTP2 sends requests of every shape, of Go's own client to Go's own
// server.
func TestHTTP2(t *testing.T) {
	for _, port := range []uint16{80, 81} {
		t.Run(fmt.Sprint(port), func(t *testing.T) {
			eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) { testHTTP2(t, in, app, port) })
		})
	}
}

func testHTTP2(t *testing.T, in, app *node, port uint16) {
	app.app2(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 2 {
			t.Errorf("the application was asked in %s", r.Proto)
		}
		if r.URL.Path == "/hints" {
			w.Header().Set("Link", "</a>")
			w.WriteHeader(103)
		}
		w.Header().Set("Trailer", "X-After")
		reflect(w, r)
		w.Header().Set("X-After", r.Trailer.Get("X-Before"))
	}), port)
	base := "http://" + in.out(clientNumber, serverPort(port))
	client := http2Client(t)
	large := make([]byte, 3<<20)
	for i := range large {
		large[i] = byte(rand.Uint32())
	}
	for round := range 2 {
		for _, body := range [][]byte{nil, []byte("x"), large[:100_000], large} {
			for _, chunked := range []bool{false, true} {
				var r io.Reader = bytes.NewReader(body)
				if chunked {
					r = io.MultiReader(r)
				}
				req, _ := http.NewRequest("POST", base+"/a?q=1", r)
				req.Header.Set("X-Forwarded-Client-Cert", "URI=spiffe://example.org/root")
				req.Header.Set("X-Sallyport-Role", "root")
				req.Header.Set("Expect", "100-continue")
				if chunked {
					req.Trailer = http.Header{"X-Before": {"all"}}
				}
				resp, err := client.Do(req)
				if err != nil {
					t.Fatalf("round %d, %d bytes, chunked %v: %v", round, len(body), chunked, err)
				}
				got, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if err != nil || resp.StatusCode != 200 || !bytes.Equal(got, body) {
					t.Fatalf("round %d, %d bytes, chunked %v: status %d, %d bytes, %v", round, len(body), chunked, resp.StatusCode, len(got), err)
				}
				if cert := resp.Header.Get("X-Client-Cert"); !strings.HasSuffix(cert, "URI="+clientID) || resp.Header.Get("X-Role") != "" {
					t.Errorf("the application saw the client as %q, %q", cert, resp.Header.Get("X-Role"))
				}
				if chunked && len(body) > 0 && resp.Trailer.Get("X-After") != "all" {
					t.Errorf("trailers %v", resp.Trailer)
				}
			}
		}
	}
	for _, c := range []struct {
		method, path string
		status       int
	}{{"HEAD", "/a", 200}, {"GET", "/none", 204}, {"GET", "/stream", 200}, {"GET", "/hints", 200}, {"GET", "/debug/x", 403}, {"HEAD", "/debug/x", 403}, {"GET", "/a", 200}} {
		if port == 81 && c.status == 403 {
			continue
		}
		req, _ := http.NewRequest(c.method, base+c.path, nil)
		resp, err := client.Do(req)
		if err != nil {
			t.Fatalf("%s %s: %v", c.method, c.path, err)
		}
		if resp.StatusCode != c.status {
			t.Errorf("%s %s: status %d", c.method, c.path, resp.StatusCode)
		}
		if c.status == 403 && c.method == "GET" {
			reason, id := problem(t, resp)
			if r := app.recorded(flow.ReasonDenyRule); reason != flow.ReasonDenyRule || r.RequestID != id || r.Rule != "no-debug" || r.Protocol != "http" {
				t.Errorf("reason %s, record %+v", reason, r)
			}
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	app.mu.Lock()
	defer app.mu.Unlock()
	applications := 0
	for _, d := range app.dials {
		if d.Kind == DialApplication {
			applications++
		}
	}
	if applications != 1 {
		t.Errorf("%d connections to the application for one of the client", applications)
	}
}

// TestNotGRPC holds that a protocol: grpc port takes nothing else, and says
// so in the protocol that it is asked in.
func TestNotGRPC(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		app.rpc(84)
		addr := in.out(clientNumber, serverPort(84))
		for name, client := range map[string]*http.Client{"HTTP/1.1": httpClient(t), "HTTP/2": http2Client(t)} {
			for _, contentType := range []string{"application/json", "application/grpc-web", "application/grpcx", "text/application/grpc"} {
				resp, err := client.Post("http://"+addr+"/t.Echo/Unary", contentType, strings.NewReader("x"))
				if err != nil {
					t.Fatal(err)
				}
				if reason, _ := problem(t, resp); reason != flow.ReasonNotGRPC || resp.StatusCode != 415 {
					t.Errorf("%s, %s: %d for %s", name, contentType, resp.StatusCode, reason)
				}
			}
		}
		resp, err := httpClient(t).Post("http://"+addr+"/t.Echo/Unary", "application/grpc", strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		if reason, _ := problem(t, resp); reason != flow.ReasonNotGRPC {
			t.Errorf("over HTTP/1.1: %s", reason)
		}
		resp, err = ask(t, dialTCP(t, addr), "EHLO example\r\n")
		if err != nil {
			t.Fatal(err)
		}
		if reason, _ := problem(t, resp); reason != flow.ReasonNotHTTP {
			t.Errorf("another protocol: %s", reason)
		}
	})
}

// TestRefusedEarly holds that a call that may not leave is answered in its
// own protocol, however late it begins.
func TestRefusedEarly(t *testing.T) {
	eachWay(t, nodeOptions{change: atOnce}, func(t *testing.T, in, app *node) {
		addr := in.out(otherNumber, serverPort(84)) // which may not call the server
		_, err := call1(within(t), rpcClient(t, addr, nil, grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return dialLate(t, addr), nil })), "/t.Echo/Unary", "x")
		refusedCall(t, err, codes.PermissionDenied, flow.ReasonMayCall)
		resp, err := http2Client(t).Get("http://" + addr + "/a")
		if err != nil {
			t.Fatal(err)
		}
		if reason, _ := problem(t, resp); reason != flow.ReasonMayCall {
			t.Errorf("reason %s", reason)
		}
	})
}

// TestNoApplication2 holds what calls get where the application is not there,
// is silent, or speaks no HTTP/2.
func TestNoApplication2(t *testing.T) {
	short := func(o *Options) { o.ConnectTimeout = 2 * time.Second }
	eachWay(t, nodeOptions{change: short}, func(t *testing.T, in, app *node) {
		addr := in.out(clientNumber, serverPort(84))
		app.mu.Lock()
		app.apps[serverPort(84)] = "127.0.0.1:1"
		app.mu.Unlock()
		_, err := call1(within(t), rpcClient(t, addr, nil), "/t.Echo/Unary", "x")
		refusedCall(t, err, codes.Unavailable, flow.ReasonUpstreamGone)
		for _, answer := range []string{"", "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"} {
			app.raw(func(c *net.TCPConn) {
				_, _ = io.WriteString(c, answer)
				_, _ = io.Copy(io.Discard, c)
			}, 84)
			_, err := call1(within(t), rpcClient(t, addr, nil), "/t.Echo/Unary", "x")
			refusedCall(t, err, codes.Unavailable, flow.ReasonUpstream)
		}
	})
}

// TestGoAway holds that an application that ends its connection in order has
// the client make another one, and that what is under way goes on.
func TestGoAway(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		ln, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		server, _ := newEchoService()
		go server.Serve(ln)
		app.at(ln.Addr().String(), 84)
		conn := rpcClient(t, in.out(clientNumber, serverPort(84)), nil)
		chat, err := conn.NewStream(within(t), bidi, "/t.Echo/Chat")
		if err != nil {
			t.Fatal(err)
		}
		say := func() {
			t.Helper()
			m := wrapperspb.Bytes([]byte("hello"))
			if err := errors.Join(chat.SendMsg(m), chat.RecvMsg(m)); err != nil {
				t.Fatal(err)
			}
		}
		say()
		stopped := make(chan struct{})
		go func() { server.GracefulStop(); close(stopped) }()
		app.rpc(84)
		for { // until the client has heard of it, its calls may still go the old way
			if _, err := call1(within(t), conn, "/t.Echo/Unary", "x", grpc.WaitForReady(true)); err != nil {
				t.Fatal(err)
			}
			app.mu.Lock()
			dials := len(app.dials)
			app.mu.Unlock()
			if dials >= 2 {
				break
			}
		}
		say()
		_ = chat.CloseSend()
		if err := chat.RecvMsg(new(wrapperspb.BytesValue)); !errors.Is(err, io.EOF) {
			t.Errorf("at the end: %v", err)
		}
		<-stopped
	})
}

// framer is a client that says what it likes.
type framer struct {
	*http2.Framer
	t    testing.TB
	conn net.Conn
	enc  *hpack.Encoder
	b    bytes.Buffer
}

func newFramer(t testing.TB, addr string, settings ...http2.Setting) *framer {
	f := &framer{t: t, conn: dialTCP(t, addr)}
	f.Framer, f.enc = http2.NewFramer(f.conn, f.conn), hpack.NewEncoder(&f.b)
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if _, err := io.WriteString(f.conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	if err := f.WriteSettings(settings...); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *framer) headers(id uint32, end bool, pairs ...string) {
	f.t.Helper()
	f.b.Reset()
	for i := 0; i < len(pairs); i += 2 {
		_ = f.enc.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
	}
	block := f.b.Bytes()
	for first := true; first || len(block) > 0; first = false {
		n := min(len(block), 16384)
		var err error
		if first {
			err = f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block[:n], EndStream: end, EndHeaders: n == len(block)})
		} else {
			err = f.WriteContinuation(id, n == len(block), block[:n])
		}
		if err != nil {
			f.t.Fatal(err)
		}
		block = block[n:]
	}
}

// answer is what came back on a stream.
type answer struct {
	status       string
	body         []byte
	code         http2.ErrCode // of RST_STREAM
	reset, ended bool
}

// answer reads to the end of a stream. It grants no windows.
func (f *framer) answer(id uint32) (a answer) {
	f.t.Helper()
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			f.t.Fatalf("stream %d: %v", id, err)
		}
		if frame.Header().StreamID != id {
			if g, ok := frame.(*http2.GoAwayFrame); ok && g.ErrCode != http2.ErrCodeNo {
				f.t.Fatalf("GOAWAY %v", g.ErrCode)
			}
			continue
		}
		switch v := frame.(type) {
		case *http2.MetaHeadersFrame:
			if s := v.PseudoValue("status"); s != "" {
				a.status = s
			}
		case *http2.DataFrame:
			a.body = append(a.body, v.Data()...)
		case *http2.RSTStreamFrame:
			a.reset, a.code = true, v.ErrCode
			return a
		}
		if frame.Header().Flags.Has(http2.FlagDataEndStream) && frame.Header().Type != http2.FrameWindowUpdate {
			a.ended = true
			return a
		}
	}
}

var plainGet = []string{":method", "GET", ":scheme", "http", ":path", "/a", ":authority", "a"}

func with(more ...string) []string { return append(append([]string(nil), plainGet...), more...) }

func changedGet(name, value string) []string {
	out := with()
	for i := 0; i < len(out); i += 2 {
		if out[i] == name {
			out[i+1] = value
		}
	}
	return out
}

// smuggling2 is what must end at the proxy.
var smuggling2 = []struct {
	name   string
	list   []string
	reason flow.Reason
}{
	{"two paths", append([]string{":path", "/debug/x"}, plainGet...), flow.ReasonMalformed},
	{"two methods", append([]string{":method", "POST"}, plainGet...), flow.ReasonMalformed},
	{"no method", plainGet[2:], flow.ReasonMalformed},
	{"no path", plainGet[:4], flow.ReasonMalformed},
	{"no authority", plainGet[:6], flow.ReasonMalformed},
	{"authority and Host differ", with("host", "b"), flow.ReasonMalformed},
	{"two Hosts", append(append([]string(nil), plainGet[:6]...), "host", "a", "host", "a"), flow.ReasonMalformed},
	{"unknown pseudo-header", append([]string{":protocol", "websocket"}, plainGet...), flow.ReasonMalformed},
	{"status", append([]string{":status", "200"}, plainGet...), flow.ReasonMalformed},
	{"pseudo-header last", append([]string{"x", "y"}, plainGet...), flow.ReasonMalformed},
	{"upper case", with("X-Account", "a"), flow.ReasonMalformed},
	{"empty name", with("", "a"), flow.ReasonMalformed},
	{"space in a name", with("x y", "a"), flow.ReasonMalformed},
	{"colon in a name", with("x:y", "a"), flow.ReasonMalformed},
	{"line end in a value", with("x", "a\r\nevil: 1"), flow.ReasonMalformed},
	{"NUL in a value", with("x", "a\x00"), flow.ReasonMalformed},
	{"space around a value", with("x", " a"), flow.ReasonMalformed},
	{"connection", with("connection", "close"), flow.ReasonMalformed},
	{"transfer-encoding", with("transfer-encoding", "chunked"), flow.ReasonMalformed},
	{"transfer_encoding", with("transfer_encoding", "chunked"), flow.ReasonMalformed},
	{"upgrade", with("upgrade", "h2c"), flow.ReasonMalformed},
	{"te", with("te", "gzip"), flow.ReasonMalformed},
	{"two lengths", with("content-length", "0", "content-length", "0"), flow.ReasonMalformed},
	{"length that is none", with("content-length", "+0"), flow.ReasonMalformed},
	{"length without content", with("content-length", "5"), flow.ReasonMalformed},
	{"lower-case method", changedGet(":method", "get"), flow.ReasonMalformed},
	{"underscore twin", with("x-account", "a", "x_account", "b"), flow.ReasonHeaderAmbiguous},
	{"scheme", changedGet(":scheme", "file"), flow.ReasonTarget},
	{"empty path", changedGet(":path", ""), flow.ReasonTarget},
	{"absolute path", changedGet(":path", "http://a/b"), flow.ReasonTarget},
	{"//", changedGet(":path", "//debug/x"), flow.ReasonTarget},
	{"dot segment", changedGet(":path", "/a/../debug/x"), flow.ReasonTarget},
	{"encoded slash", changedGet(":path", "/a%2fdebug"), flow.ReasonTarget},
	{"fragment", changedGet(":path", "/a#b"), flow.ReasonTarget},
	{"host with a space", changedGet(":authority", "a b"), flow.ReasonMalformed},
	{"userinfo", changedGet(":authority", "u@a"), flow.ReasonMalformed},
	{"CONNECT", []string{":method", "CONNECT", ":authority", "a:1"}, flow.ReasonUpgrade},
	{"long list", with("x", strings.Repeat("\x7f", 20<<10), "y", strings.Repeat("y", 50<<10)), flow.ReasonTooLarge},
	{"many fields", with(strings.Split(strings.Repeat("x,y,", 130), ",")[:260]...), flow.ReasonTooLarge},
	{"long path", changedGet(":path", "/"+strings.Repeat("a", 9000)), flow.ReasonTooLarge},
}

// TestSmuggling2 holds that each costs the client that request, with an answer,
// and nobody the connection.
func TestSmuggling2(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		app.app2(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/last" {
				t.Errorf("the application was asked for %s", r.URL)
			}
		}), 80)
		f := newFramer(t, in.out(clientNumber, serverPort(80)))
		id := uint32(1)
		for _, c := range smuggling2 {
			f.headers(id, true, c.list...)
			a := f.answer(id)
			if want := fmt.Sprint(c.reason.Status()); a.status != want || !bytes.Contains(a.body, []byte(`"reason":"`+string(c.reason)+`"`)) {
				t.Errorf("%s: status %s, want %s for %s: %s", c.name, a.status, want, c.reason, a.body)
			}
			id += 2
		}
		f.headers(id, true, changedGet(":path", "/last")...)
		if a := f.answer(id); a.status != "200" {
			t.Errorf("the last: %+v", a)
		}
	})
}

// TestAuditPassesOn2 holds that a policy that only observes breaks nothing
// that can go on.
func TestAuditPassesOn2(t *testing.T) {
	eachWay(t, nodeOptions{mode: "audit"}, func(t *testing.T, in, app *node) {
		app.app2(http.HandlerFunc(reflect), 80)
		e := app.rpc(84)
		f := newFramer(t, in.out(clientNumber, serverPort(80)))
		for i, c := range []struct {
			list   []string
			reason flow.Reason
		}{
			{changedGet(":path", "/debug/x"), flow.ReasonDenyRule},
			{changedGet(":path", "/a;b/c"), flow.ReasonTarget},
			{with("x-account", "a", "x_account", "b"), flow.ReasonHeaderAmbiguous},
		} {
			id := uint32(2*i + 1)
			f.headers(id, true, c.list...)
			if a := f.answer(id); a.status != "200" {
				t.Errorf("%q: %+v", c.list, a)
			}
			if r := app.recorded(c.reason); !r.WouldDeny {
				t.Errorf("record %+v", r)
			}
		}
		conn := rpcClient(t, in.out(clientNumber, serverPort(84)), nil)
		if got, err := call1(within(t), conn, "/t.Other/Unary", "x"); err != nil || got != "x" {
			t.Errorf("a call that no rule allows: %v", err)
		}
		if r := app.recorded(flow.ReasonNoRule); !r.WouldDeny {
			t.Errorf("record %+v", r)
		}
		ctx, cancel := context.WithCancel(within(t))
		held(t, ctx, conn, e)
		cancel()
		<-e.ended
	})
}

// TestContentLength2 holds that content of another length than was said ends
// the request, and is never complete for the application.
func TestContentLength2(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		got := make(chan error, 10)
		app.app2(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(200)
			w.(http.Flusher).Flush()
			_, err := io.ReadAll(r.Body)
			got <- err
		}), 80)
		f := newFramer(t, in.out(clientNumber, serverPort(80)))
		post := []string{":method", "POST", ":scheme", "http", ":path", "/a", ":authority", "a", "content-length", "5"}
		bad := 2
		for i, c := range []struct {
			data string
			end  bool
		}{{"1234", true}, {"123456", false}, {"12345", true}} {
			id := uint32(2*i + 1)
			f.headers(id, false, post...)
			if err := f.WriteData(id, c.end, []byte(c.data)); err != nil {
				t.Fatal(err)
			}
			a := f.answer(id)
			if c.data != "12345" {
				if a.status != "400" && a.code != http2.ErrCodeProtocol {
					t.Errorf("%q: %+v", c.data, a)
				}
				app.recorded(flow.ReasonMalformed)
				continue
			}
			for a.ended { // those before, if the application was asked for them, failed
				if err := <-got; err == nil {
					break
				}
				bad--
			}
			if !a.ended || bad < 0 {
				t.Errorf("%q: %+v, the application read %d others", c.data, a, -bad)
			}
		}
	})
}

// TestInspected2 holds the content that the policy wants to see.
func TestInspected2(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		app.app2(http.HandlerFunc(reflect), 82)
		client := http2Client(t)
		base := "http://" + in.out(clientNumber, serverPort(82)) + "/a"
		for _, chunked := range []bool{false, true} {
			for _, size := range []int{0, 1, 1024, 1025, 100_000} {
				body := bytes.Repeat([]byte("z"), size)
				var r io.Reader = bytes.NewReader(body)
				if chunked {
					r = io.MultiReader(r)
				}
				resp, err := client.Post(base, "text/plain", r)
				if err != nil {
					t.Fatal(err)
				}
				if size > 1024 {
					if reason, _ := problem(t, resp); reason != flow.ReasonTooLarge {
						t.Errorf("%d bytes: %s", size, reason)
					}
					continue
				}
				got, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if err != nil || !bytes.Equal(got, body) {
					t.Errorf("%d bytes: %d, %v", size, len(got), err)
				}
			}
		}
	})
}

// TestSlowReader grants a little window at a time.
func TestSlowReader(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		const size = 300_000
		app.app2(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			for i := range size / 1000 {
				_, _ = w.Write(bytes.Repeat([]byte{byte(i)}, 1000))
			}
		}), 80)
		f := newFramer(t, in.out(clientNumber, serverPort(80)), http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
		f.headers(1, true, plainGet...)
		if err := f.WriteWindowUpdate(1, 5000); err != nil {
			t.Fatal(err)
		}
		got := 0
		for {
			frame, err := f.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			d, ok := frame.(*http2.DataFrame)
			if !ok {
				continue
			}
			for _, b := range d.Data() {
				if b != byte(got/1000) {
					t.Fatalf("byte %d is %d", got, b)
				}
				got++
			}
			if d.StreamEnded() {
				break
			}
			if n := uint32(len(d.Data())); n > 0 {
				if err := errors.Join(f.WriteWindowUpdate(1, n), f.WriteWindowUpdate(0, n)); err != nil {
					t.Fatal(err)
				}
			}
		}
		if got != size {
			t.Errorf("%d bytes", got)
		}
	})
}

// TestFlood2 holds that a client that passes a bound loses its connection,
// and that this is recorded.
func TestFlood2(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		n := oneNode(t, nodeOptions{goroutines: goroutines})
		e := n.rpc(84)
		f := newFramer(t, n.out(clientNumber, serverPort(84)))
		go func() { // the rapid reset
			for id := uint32(1); id < 4000; id += 2 {
				f.b.Reset()
				for _, h := range []hpack.HeaderField{{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/t.Echo/Hold"},
					{Name: ":authority", Value: "a"}, {Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"}} {
					_ = f.enc.WriteField(h)
				}
				if f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: f.b.Bytes(), EndHeaders: true}) != nil || f.WriteRSTStream(id, http2.ErrCodeCancel) != nil {
					return
				}
			}
		}()
		n.recorded(flow.ReasonTooLarge)
		for {
			if _, err := f.ReadFrame(); err != nil {
				break
			}
		}
		if got, err := call1(within(t), rpcClient(t, n.out(clientNumber, serverPort(84)), nil), "/t.Echo/Unary", "x"); err != nil || got != "x" {
			t.Errorf("another client: %v", err)
		}
		for len(e.started) > 0 { // those that reached the application were taken back
			<-e.started
			<-e.ended
		}
	})
}

// TestPieces has the preface and the first frames come byte by byte.
func TestPieces(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		n := oneNode(t, nodeOptions{goroutines: goroutines})
		n.app2(http.HandlerFunc(reflect), 80, 81)
		for _, port := range []uint16{80, 81} {
			conn := dialTCP(t, n.out(clientNumber, serverPort(port)))
			var b bytes.Buffer
			b.WriteString(http2.ClientPreface)
			f := &framer{t: t, conn: conn, Framer: http2.NewFramer(&b, conn)}
			f.enc = hpack.NewEncoder(&f.b)
			f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
			if err := f.WriteSettings(); err != nil {
				t.Fatal(err)
			}
			f.headers(1, true, plainGet...)
			for _, c := range b.Bytes() {
				if _, err := conn.Write([]byte{c}); err != nil {
					t.Fatal(err)
				}
			}
			if a := f.answer(1); a.status != "200" {
				t.Errorf("port %d: %+v", port, a)
			}
		}
	})
}

// TestNginxAndCurl2 has implementations that are not Go's speak to each other.
func TestNginxAndCurl2(t *testing.T) {
	testenv.Program(t, "curl")
	large := make([]byte, 5<<20)
	for i := range large {
		large[i] = byte(rand.Uint32())
	}
	addr := startNginx(t, large, "http2")
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		app.at(addr, 80)
		base := "http://" + in.out(clientNumber, serverPort(80))
		curl := func(args ...string) []byte {
			t.Helper()
			out, err := exec.Command("curl", append([]string{"-sS", "--max-time", "20", "--http2-prior-knowledge"}, args...)...).CombinedOutput()
			if err != nil {
				t.Fatalf("curl %v: %v %s", args, err, out)
			}
			return out
		}
		// One URL at a time: curl 7.88 fails to use such a connection again.
		if out := curl(base + "/text"); !bytes.Contains(out, []byte("from nginx for By="+serverID)) {
			t.Errorf("got %q", out)
		}
		if out := curl(base+"/large", "-o", "-"); !bytes.Equal(out, large) {
			t.Errorf("got %d bytes", len(out))
		}
		if out := curl("-I", base+"/large"); !bytes.Contains(out, []byte("content-length: 5242880")) {
			t.Errorf("HEAD: got %q", out)
		}
		if out := curl("-w", "%{http_code} %{http_version}", base+"/debug/x"); !bytes.HasSuffix(out, []byte("403 2")) || !bytes.Contains(out, []byte(flow.ReasonDenyRule)) {
			t.Errorf("denied: got %q", out)
		}
		if out := curl("--path-as-is", "-w", "%{http_code}", base+"/text/../large"); !bytes.HasSuffix(out, []byte("400")) {
			t.Errorf("dot segment: got %q", out)
		}
	})
}
