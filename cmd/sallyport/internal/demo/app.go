// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/sallyport-dev/sallyport/cmd/sallyport/internal/lab"
)

// appTimeout bounds everything that an application of the demo waits for.
const appTimeout = 5 * time.Second

// appRequest is one order to an application process, one JSON line on its
// standard input. Op is http, dial, exchange, close, serve, stop or seen.
type appRequest struct {
	Op     string            `json:"op"`
	URL    string            `json:"url,omitempty"`
	Method string            `json:"method,omitempty"`
	Header map[string]string `json:"header,omitempty"`
	Body   string            `json:"body,omitempty"`
	Addr   string            `json:"addr,omitempty"`
	Kind   string            `json:"kind,omitempty"` // serve: http or tcp
	Conn   int               `json:"conn,omitempty"`
	Data   string            `json:"data,omitempty"`
	Fresh  bool              `json:"fresh,omitempty"` // http: a connection of its own
}

// appReply answers one appRequest. Err is what the application saw go wrong.
type appReply struct {
	Err    string      `json:"err,omitempty"`
	Status int         `json:"status,omitempty"`
	Header http.Header `json:"header,omitempty"`
	Body   string      `json:"body,omitempty"`
	Conn   int         `json:"conn,omitempty"`
	Local  string      `json:"local,omitempty"`
	Peer   string      `json:"peer,omitempty"` // getpeername()
	Data   string      `json:"data,omitempty"`
	Seen   []appSeen   `json:"seen,omitempty"`
}

// appSeen is one connection that a server of the demo accepted: who accept()
// said it was, and the first bytes that came.
type appSeen struct {
	Peer  string `json:"peer"`
	First string `json:"first"`
}

// echoReply is what the HTTP server of the demo answers with.
type echoReply struct {
	Peer string `json:"peer"`
	Path string `json:"path"`
	Read int64  `json:"read"`
}

// App runs an ordinary application: a client and a server that know nothing
// of Sallyport, driven line by line over in and out. It ends when in does.
func App(in io.Reader, out io.Writer) error {
	a := &app{conns: map[int]net.Conn{}, servers: map[string]*appServer{}}
	defer a.closeAll()
	dec := json.NewDecoder(bufio.NewReader(in))
	enc := json.NewEncoder(out)
	for {
		var q appRequest
		if err := dec.Decode(&q); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return fmt.Errorf("read order: %w", err)
		}
		if err := enc.Encode(a.do(&q)); err != nil {
			return fmt.Errorf("write reply: %w", err)
		}
	}
}

type app struct {
	conns   map[int]net.Conn
	last    int
	servers map[string]*appServer
	client  *http.Client
}

func (a *app) do(q *appRequest) *appReply {
	var r *appReply
	var err error
	switch q.Op {
	case "http":
		r, err = a.http(q)
	case "dial":
		r, err = a.dial(q)
	case "exchange":
		r, err = a.exchange(q)
	case "close":
		if c := a.conns[q.Conn]; c != nil {
			delete(a.conns, q.Conn)
			err = c.Close()
		}
	case "serve":
		err = a.serve(q)
	case "stop":
		if s := a.servers[q.Addr]; s != nil {
			delete(a.servers, q.Addr)
			s.close()
		}
	case "seen":
		r = &appReply{}
		if s := a.servers[q.Addr]; s != nil {
			r.Seen = s.take()
		}
	default:
		err = fmt.Errorf("unknown op %q", q.Op)
	}
	if r == nil {
		r = &appReply{}
	}
	if err != nil {
		r.Err = errorText(err)
	}
	return r
}

// errorText names the errno where there is one: that is what a program sees.
func errorText(err error) string {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return errno.Error()
	}
	var ne net.Error
	if errors.As(err, &ne) && ne.Timeout() {
		return "timeout"
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return "EOF"
	}
	return err.Error()
}

func (a *app) http(q *appRequest) (*appReply, error) {
	if a.client == nil || q.Fresh {
		a.client = &http.Client{Timeout: appTimeout, Transport: &http.Transport{}}
	}
	if q.Fresh {
		defer a.client.CloseIdleConnections()
	}
	req, err := http.NewRequest(q.Method, q.URL, strings.NewReader(q.Body))
	if err != nil {
		return nil, err
	}
	for k, v := range q.Header {
		req.Header.Set(k, v)
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	return &appReply{Status: resp.StatusCode, Header: resp.Header, Body: string(body)}, err
}

func (a *app) dial(q *appRequest) (*appReply, error) {
	d := net.Dialer{Timeout: appTimeout}
	c, err := d.Dial("tcp", q.Addr)
	if err != nil {
		return nil, err
	}
	peer, err := peerName(c.(*net.TCPConn))
	if err != nil {
		c.Close()
		return nil, err
	}
	a.last++
	a.conns[a.last] = c
	return &appReply{Conn: a.last, Local: c.LocalAddr().String(), Peer: peer}, nil
}

// peerName asks the kernel, not the Go runtime, which remembers what it
// dialled.
func peerName(c *net.TCPConn) (string, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return "", err
	}
	var name string
	var inner error
	err = raw.Control(func(fd uintptr) {
		sa, e := syscall.Getpeername(int(fd))
		if e != nil {
			inner = e
			return
		}
		switch s := sa.(type) {
		case *syscall.SockaddrInet4:
			name = netip.AddrPortFrom(netip.AddrFrom4(s.Addr), uint16(s.Port)).String()
		case *syscall.SockaddrInet6:
			name = netip.AddrPortFrom(netip.AddrFrom16(s.Addr).Unmap(), uint16(s.Port)).String()
		}
	})
	return name, errors.Join(err, inner)
}

func (a *app) exchange(q *appRequest) (*appReply, error) {
	c := a.conns[q.Conn]
	if c == nil {
		return nil, fmt.Errorf("no connection %d", q.Conn)
	}
	if err := c.SetDeadline(time.Now().Add(appTimeout)); err != nil {
		return nil, err
	}
	if _, err := io.WriteString(c, q.Data); err != nil {
		return nil, err
	}
	b := make([]byte, 4096)
	n, err := c.Read(b)
	return &appReply{Data: string(b[:n])}, err
}

func (a *app) closeAll() {
	for _, c := range a.conns {
		c.Close()
	}
	for _, s := range a.servers {
		s.close()
	}
}

func (a *app) serve(q *appRequest) error {
	l, err := net.Listen("tcp", q.Addr)
	if err != nil {
		return err
	}
	s := &appServer{l: l, open: map[net.Conn]bool{}}
	a.servers[q.Addr] = s
	if q.Kind == "http" {
		s.http = &http.Server{Handler: http.HandlerFunc(echo), ReadHeaderTimeout: appTimeout}
		go s.http.Serve(seenListener{l, s}) //nolint:errcheck // ends with its listener
		return nil
	}
	go s.echo()
	return nil
}

func echo(w http.ResponseWriter, r *http.Request) {
	n, err := io.Copy(io.Discard, r.Body)
	if err != nil {
		http.Error(w, "read body", http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(echoReply{Peer: r.RemoteAddr, Path: r.URL.Path, Read: n}) //nolint:errcheck // the client has gone
}

// appServer notes every connection that accept() gave it and the first bytes
// on each.
type appServer struct {
	l    net.Listener
	http *http.Server
	mu   sync.Mutex
	seen []*seenConn
	open map[net.Conn]bool
}

func (s *appServer) take() []appSeen {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]appSeen, 0, len(s.seen))
	for _, c := range s.seen {
		c.mu.Lock()
		out = append(out, appSeen{Peer: c.RemoteAddr().String(), First: string(c.first)})
		c.mu.Unlock()
	}
	s.seen = nil
	return out
}

func (s *appServer) note(c net.Conn) *seenConn {
	n := &seenConn{Conn: c}
	s.mu.Lock()
	s.seen = append(s.seen, n)
	s.open[c] = true
	s.mu.Unlock()
	return n
}

func (s *appServer) close() {
	s.l.Close()
	if s.http != nil {
		s.http.Close()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.open {
		c.Close()
	}
}

func (s *appServer) echo() {
	for {
		c, err := s.l.Accept()
		if err != nil {
			return
		}
		n := s.note(c)
		go func() {
			defer c.Close()
			io.Copy(c, n) //nolint:errcheck // ends with the connection
			s.mu.Lock()
			delete(s.open, c)
			s.mu.Unlock()
		}()
	}
}

// seenConn keeps the first bytes that were read from a connection.
type seenConn struct {
	net.Conn
	mu    sync.Mutex
	first []byte
}

func (c *seenConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.mu.Lock()
	if room := 128 - len(c.first); room > 0 {
		c.first = append(c.first, bytes.Clone(p[:min(n, room)])...)
	}
	c.mu.Unlock()
	return n, err
}

type seenListener struct {
	net.Listener
	s *appServer
}

func (l seenListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.s.note(c), nil
}

// AppMain is App on the process's own standard input and output.
func AppMain() error { return App(os.Stdin, os.Stdout) }

// application is an App in a process of its own.
type application struct {
	*lab.Process
	name string
	enc  *json.Encoder
	dec  *json.Decoder
}

func startApp(l *lab.Lab, space, cgroup, name string) (*application, error) {
	p, err := l.Start(space, cgroup, name, nil, "/proc/self/exe", "demo", "application")
	if err != nil {
		return nil, err
	}
	return &application{Process: p, name: name, enc: json.NewEncoder(p.In), dec: json.NewDecoder(p.Out)}, nil
}

// do gives an order and waits for its reply. An application that has ended
// answers with an error.
func (a *application) do(q appRequest) appReply {
	if err := a.enc.Encode(q); err != nil {
		return appReply{Err: fmt.Sprintf("order to %s: %v", a.name, err)}
	}
	type answer struct {
		r   appReply
		err error
	}
	c := make(chan answer, 1)
	go func() {
		var r appReply
		err := a.dec.Decode(&r)
		c <- answer{r, err}
	}()
	t := time.NewTimer(4 * appTimeout)
	defer t.Stop()
	select {
	case x := <-c:
		if x.err != nil {
			return appReply{Err: fmt.Sprintf("reply of %s: %v: %s", a.name, x.err, a.LastLines(3))}
		}
		return x.r
	case <-t.C:
		return appReply{Err: errors.New("no reply of " + a.name).Error()}
	}
}
