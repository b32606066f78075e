// SPDX-License-Identifier: Apache-2.0

// Package obtain is the OAuth client of the node's workloads: it obtains access
// tokens that are bound to a workload's certificate (RFC 6749 section 4.4 with
// RFC 8705) ahead of their use, and keeps them fresh. Requests only read.
package obtain

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/identity"
)

// Bounds and pace.
const (
	// MaxWants bounds how many tokens are kept at once.
	MaxWants = 4096

	timeout   = 10 * time.Second // of one request to an issuer
	atOnce    = 32               // requests
	atOnceOne = 8                // of them to one issuer
	atOnceNew = 2                // as long as it has not answered yet, or not the last time
	retryMin  = time.Second
	retryMax  = time.Minute
	maxHeld   = 8 // leaves of one identity that have not expired
	lookAgain = time.Second
)

// Want is a token that an identity of this node is to have for its calls to
// another identity.
type Want struct {
	ID       string // SPIFFE ID of the caller
	To       string // full name of who is called
	Issuer   string // full name of the TokenIssuer
	URL      string // its token endpoint
	ClientID string
	Audience string
	Scopes   []string
	// MaxLifetime is the longest that the issuer's tokens live.
	MaxLifetime time.Duration
}

// Token is an access token and the leaf that it is bound to.
type Token struct {
	// Field is the value of an Authorization field. It is shared: read it only.
	Field      []byte
	Thumbprint [32]byte // SHA-256 of the leaf
	Expires    time.Time
}

// Options configures a Source.
type Options struct {
	Leaves *identity.Leaves
	// Dial connects to an issuer's token endpoint, for an identity.
	Dial  func(ctx context.Context, id, issuer string) (net.Conn, error)
	Roots *x509.CertPool // that issuers' certificates lead to
	Log   *slog.Logger   // nil discards
	Now   func() time.Time
}

// Source keeps the tokens of all identities of this node. It is safe for
// concurrent use; reads take no lock.
type Source struct {
	opt     Options
	ctx     context.Context
	cancel  context.CancelFunc
	slots   chan struct{}
	timeout time.Duration // of one request to an issuer
	table   atomic.Pointer[map[key]*keeper]
	work    sync.WaitGroup

	watchers watchers

	mu      sync.Mutex // guards what follows, and changes of table
	closed  bool
	issuers map[endpoint]*issuer
}

type key struct{ id, to string }

// New returns a source that keeps nothing. Close ends it.
func New(o Options) *Source {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	s := &Source{opt: o, slots: make(chan struct{}, atOnce), timeout: timeout, watchers: watchers{by: map[key]map[uint64]func(){}}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.table.Store(&map[key]*keeper{})
	return s
}

// Close ends all requests, and waits for that.
func (s *Source) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.work.Wait()
}

// Set replaces what is kept. The tokens of wants that stay are kept.
func (s *Source) Set(wants []Want) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	var err error
	if len(wants) > MaxWants {
		err = fmt.Errorf("obtain tokens: %d are wanted, at most %d are kept", len(wants), MaxWants)
		wants = wants[:MaxWants]
	}
	old, next, issuers := *s.table.Load(), make(map[key]*keeper, len(wants)), map[endpoint]*issuer{}
	for _, w := range wants {
		at, e := key{w.ID, w.To}, endpoint{w.Issuer, w.URL}
		if issuers[e] == nil {
			if issuers[e] = s.issuers[e]; issuers[e] == nil {
				issuers[e] = newIssuer()
			}
		}
		k := old[at]
		if k == nil || !reflect.DeepEqual(k.want, w) {
			k = newKeeper(s, issuers[e], w)
			s.work.Go(k.run)
		}
		next[at] = k
	}
	s.issuers = issuers
	s.table.Store(&next)
	for at, k := range old {
		if next[at] != k {
			k.stop()
			s.watchers.tell(at)
		}
	}
	for at := range next {
		if old[at] == nil {
			s.watchers.tell(at)
		}
	}
	return err
}

// Newest returns the token that an identity has for its calls to another, nil
// where it has none.
func (s *Source) Newest(id, to string) *Token {
	if k := (*s.table.Load())[key{id, to}]; k != nil {
		return k.newest(s.opt.Now())
	}
	return nil
}

func (k *keeper) newest(now time.Time) *Token {
	list := *k.tokens.Load()
	for n := range slices.Backward(list) {
		if now.Before(list[n].Expires) {
			return &list[n]
		}
	}
	return nil
}

// Pending says whether an identity is to have a token for its calls to another
// and no try to obtain one has ended yet.
func (s *Source) Pending(id, to string) bool {
	k := (*s.table.Load())[key{id, to}]
	if k == nil {
		return false
	}
	select {
	case <-k.tried:
		return false
	default:
		return true
	}
}

// All returns the tokens that an identity has for its calls to another, one
// for each of its leaves.
func (s *Source) All(id, to string) []Token {
	if k := (*s.table.Load())[key{id, to}]; k != nil {
		return *k.tokens.Load()
	}
	return nil
}

// Await waits until the first try to obtain a token has ended, or ctx.
func (s *Source) Await(ctx context.Context, id, to string) {
	k := (*s.table.Load())[key{id, to}]
	if k == nil {
		return
	}
	select {
	case <-k.tried:
	case <-k.ctx.Done():
	case <-ctx.Done():
	}
}

// Watch has f called, from any goroutine, each time that the tokens of an
// identity for its calls to another may have changed, by Set too, until stop is
// called. f must not block.
func (s *Source) Watch(id, to string, f func()) (stop func()) {
	w := &s.watchers
	w.mu.Lock()
	defer w.mu.Unlock()
	at, n := key{id, to}, w.next
	w.next++
	if w.by[at] == nil {
		w.by[at] = map[uint64]func(){}
	}
	w.by[at][n] = f
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if delete(w.by[at], n); len(w.by[at]) == 0 {
			delete(w.by, at)
		}
	}
}

// watchers are who wants to know of changes.
type watchers struct {
	mu   sync.Mutex
	next uint64
	by   map[key]map[uint64]func()
}

func (w *watchers) tell(at key) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range w.by[at] {
		f()
	}
}

// Status is what operators see of one token.
type Status struct {
	ID      string    `json:"id"`
	To      string    `json:"to"`
	Issuer  string    `json:"issuer"`
	Expires time.Time `json:"expires,omitzero"` // zero while there is none
	Error   string    `json:"error,omitempty"`  // of the last try, empty if that went well
}

// Status lists all tokens that are kept, sorted.
func (s *Source) Status() []Status {
	table := *s.table.Load()
	list := make([]Status, 0, len(table))
	for _, at := range slices.SortedFunc(maps.Keys(table), func(a, b key) int {
		return strings.Compare(a.id+"\x00"+a.to, b.id+"\x00"+b.to)
	}) {
		k := table[at]
		one := Status{ID: at.id, To: at.to, Issuer: k.want.Issuer}
		if t := k.newest(s.opt.Now()); t != nil {
			one.Expires = t.Expires
		}
		if f := k.failure.Load(); f != nil {
			one.Error = *f
		}
		list = append(list, one)
	}
	return list
}
