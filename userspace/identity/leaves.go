// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// SignFunc asks the CA for a leaf: a PKCS#10 request in, a DER chain out,
// leaf first, without the root. It is called from several goroutines.
type SignFunc func(ctx context.Context, id string, csr []byte) (chain [][]byte, err error)

// Leaves' bounds and pace.
const (
	MaxLeaves     = 1 << 16 // identities held at once
	signers       = 8       // requests to the CA in flight
	leafSignTime  = 20 * time.Second
	leafRetryMin  = 100 * time.Millisecond
	leafRetryMax  = 30 * time.Second
	maxThumbprint = 64 // unexpired leaves remembered for one identity
)

// LeavesOptions configures Leaves.
type LeavesOptions struct {
	Sign SignFunc
	Log  *slog.Logger // nil discards
}

// Leaf is one certificate with its ephemeral key.
type Leaf struct {
	Certificate tls.Certificate // with Leaf set
	ID          string
	Serial      string
	Thumbprint  [32]byte
	NotAfter    time.Time // the earliest of the chain
}

// LeafStatus is what operators see of one identity's leaf.
type LeafStatus struct {
	ID       string
	Serial   string    // "" while there is none
	NotAfter time.Time // zero while there is none
	Error    string    // of the last try to renew it, "" if that went well
}

// Leaves holds an ephemeral P-256 key and a short-lived leaf for each of
// this node's identities and renews them at half of their life. Keys never
// leave this process and are never stored. It is safe for concurrent use;
// reads take no lock.
type Leaves struct {
	sign   SignFunc
	log    *slog.Logger
	ctx    context.Context
	cancel context.CancelFunc
	slots  chan struct{}
	table  atomic.Pointer[leafTable]
	mu     sync.Mutex // guards changes of table, closed and every timer
	closed bool
	work   sync.WaitGroup
}

type leafTable struct {
	byID   map[string]*leafEntry
	byName map[string]*leafEntry // by ServerName
}

type leafEntry struct {
	id      string
	uri     *url.URL
	leaf    atomic.Pointer[Leaf]
	prints  atomic.Pointer[prints]
	changed atomic.Pointer[chan struct{}]
	failure atomic.Pointer[string]
	timer   *time.Timer   // guarded by Leaves.mu; nil once removed
	due     time.Time     // of the next renewal; the timer's goroutine alone
	retry   time.Duration // after a next failure; the same
}

// prints are the thumbprints of an identity's unexpired leaves.
type prints struct {
	list     [][32]byte
	until    []time.Time
	earliest time.Time // the first of until
}

// ErrNoLeaf says that an identity has no valid leaf at the moment, and
// ErrUnsigned, beside it, that nothing has gone wrong with it so far.
var (
	ErrNoLeaf   = errors.New("no valid leaf")
	ErrUnsigned = errors.New("it is not signed yet")
)

// NewLeaves returns an empty set. Close ends it.
func NewLeaves(o LeavesOptions) *Leaves {
	l := &Leaves{sign: o.Sign, log: o.Log, slots: make(chan struct{}, signers)}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.table.Store(&leafTable{})
	return l
}

// Close stops all renewals and waits for those under way.
func (l *Leaves) Close() {
	l.mu.Lock()
	l.closed = true
	for _, e := range l.table.Load().byID {
		l.stop(e)
	}
	l.table.Store(&leafTable{})
	l.mu.Unlock()
	l.cancel()
	l.work.Wait()
}

// Set replaces the identities that are held. New ones get their first leaf
// in the background; the others keep theirs.
func (l *Leaves) Set(ids []string) error {
	if len(ids) > MaxLeaves {
		return fmt.Errorf("hold leaves: %d identities, at most %d", len(ids), MaxLeaves)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return errors.New("hold leaves: closed")
	}
	old := l.table.Load()
	next := &leafTable{byID: make(map[string]*leafEntry, len(ids)), byName: make(map[string]*leafEntry, len(ids))}
	var fresh []*leafEntry
	for _, id := range ids {
		if next.byID[id] != nil {
			continue
		}
		e := old.byID[id]
		if e == nil {
			if _, err := ParseID(id); err != nil {
				return fmt.Errorf("hold leaf of %q: %w", id, err)
			}
			uri, err := url.Parse(id)
			if err != nil {
				return fmt.Errorf("hold leaf of %q: %w", id, err)
			}
			e = &leafEntry{id: id, uri: uri, retry: leafRetryMin}
			changed := make(chan struct{})
			e.changed.Store(&changed)
			fresh = append(fresh, e)
		}
		next.byID[id], next.byName[ServerName(id)] = e, e
	}
	for id, e := range old.byID {
		if next.byID[id] == nil {
			l.stop(e)
		}
	}
	l.table.Store(next)
	for _, e := range fresh {
		e.timer = time.AfterFunc(0, func() { l.wake(e) })
	}
	return nil
}

func (l *Leaves) stop(e *leafEntry) {
	if e.timer != nil {
		e.timer.Stop()
		e.timer = nil
	}
}

// Get returns the leaf of an identity without waiting: ErrNoLeaf where there
// is none yet, or the last one has expired.
func (l *Leaves) Get(id string) (*Leaf, error) {
	return l.table.Load().byID[id].current(id)
}

func (e *leafEntry) current(name string) (*Leaf, error) {
	if e == nil {
		return nil, fmt.Errorf("%w of %q: it is not an identity of this node", ErrNoLeaf, name)
	}
	leaf := e.leaf.Load()
	if leaf == nil || time.Now().After(leaf.NotAfter) {
		if f := e.failure.Load(); f != nil {
			return nil, fmt.Errorf("%w of %s: %s", ErrNoLeaf, e.id, *f)
		}
		return nil, fmt.Errorf("%w of %s: %w", ErrNoLeaf, e.id, ErrUnsigned)
	}
	return leaf, nil
}

// Wait returns the leaf of an identity, waiting for its first one until ctx
// ends.
func (l *Leaves) Wait(ctx context.Context, id string) (*Leaf, error) {
	for {
		changed, ok := l.Changed(id)
		leaf, err := l.Get(id)
		if err == nil || !ok {
			return leaf, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for leaf: %w: %w", ctx.Err(), err)
		}
	}
}

// Changed returns a channel that is closed when the identity's leaf is next
// replaced; ok is false for an identity that is not held.
func (l *Leaves) Changed(id string) (changed <-chan struct{}, ok bool) {
	e := l.table.Load().byID[id]
	if e == nil {
		return nil, false
	}
	return *e.changed.Load(), true
}

// ByServerName returns the leaf of the identity whose ServerName a client
// asked for.
func (l *Leaves) ByServerName(name string) (*Leaf, error) {
	return l.table.Load().byName[name].current(name)
}

// Thumbprints returns the SHA-256 digests of the identity's leaves that have
// not expired, which a certificate-bound token (RFC 8705) of a caller on the
// same node may name. The slice is shared: read it only.
func (l *Leaves) Thumbprints(id string) [][32]byte {
	e := l.table.Load().byID[id]
	if e == nil {
		return nil
	}
	p := e.prints.Load()
	if p == nil {
		return nil
	}
	now := time.Now()
	if !now.After(p.earliest) {
		return p.list
	}
	live := p.live(now)
	e.prints.CompareAndSwap(p, live) // lost to a renewal: its own is as good
	return live.list
}

func (p *prints) live(now time.Time) *prints {
	next := &prints{}
	if p != nil {
		for i, until := range p.until {
			if !now.After(until) {
				next.add(p.list[i], until)
			}
		}
	}
	return next
}

func (p *prints) add(print [32]byte, until time.Time) {
	if len(p.list) == maxThumbprint {
		p.list, p.until = slices.Delete(p.list, 0, 1), slices.Delete(p.until, 0, 1)
	}
	p.list, p.until = append(p.list, print), append(p.until, until)
	p.earliest = slices.MinFunc(p.until, time.Time.Compare)
}

// Status lists all identities held, sorted.
func (l *Leaves) Status() []LeafStatus {
	table := l.table.Load()
	list := make([]LeafStatus, 0, len(table.byID))
	for _, id := range slices.Sorted(maps.Keys(table.byID)) {
		e := table.byID[id]
		s := LeafStatus{ID: id}
		if leaf := e.leaf.Load(); leaf != nil {
			s.Serial, s.NotAfter = leaf.Serial, leaf.NotAfter
		}
		if f := e.failure.Load(); f != nil {
			s.Error = *f
		}
		list = append(list, s)
	}
	return list
}

// wake runs on a timer's goroutine; of one entry there is only ever one. It
// renews what is due by the wall clock and sets the timer again.
func (l *Leaves) wake(e *leafEntry) {
	l.mu.Lock()
	if l.closed || e.timer == nil {
		l.mu.Unlock()
		return
	}
	l.work.Add(1)
	l.mu.Unlock()
	defer l.work.Done()

	if !e.due.After(wall(time.Now())) {
		l.renew(e)
	}
	l.mu.Lock()
	if e.timer != nil {
		wait := min(e.due.Sub(wall(time.Now())), clockStep)
		e.timer = time.AfterFunc(wait, func() { l.wake(e) })
	}
	l.mu.Unlock()
}

func (l *Leaves) renew(e *leafEntry) {
	select {
	case l.slots <- struct{}{}:
	case <-l.ctx.Done():
		return
	}
	leaf, err := l.obtain(e)
	<-l.slots
	if l.ctx.Err() != nil {
		return
	}
	now := wall(time.Now())
	if err != nil {
		text := err.Error()
		e.failure.Store(&text)
		l.log.Warn("renew leaf", "id", e.id, "error", err, "retry", e.retry)
		e.due, e.retry = now.Add(jitter(e.retry)), min(2*e.retry, leafRetryMax)
		return
	}
	e.install(leaf, now)
	e.due, e.retry = renewAt(now, leaf.NotAfter), leafRetryMin
}

func (e *leafEntry) install(leaf *Leaf, now time.Time) {
	p := e.prints.Load().live(now)
	p.add(leaf.Thumbprint, leaf.NotAfter)
	e.prints.Store(p) // before the leaf is used, so that a token bound to it is known
	e.leaf.Store(leaf)
	e.failure.Store(nil)
	changed := make(chan struct{})
	close(*e.changed.Swap(&changed))
}

// obtain makes a key and gets a leaf over it. What comes back is held
// against what was asked for: a wrong answer must not become an outage at
// every peer.
func (l *Leaves) obtain(e *leafEntry) (*Leaf, error) {
	ctx, cancel := context.WithTimeout(l.ctx, leafSignTime)
	defer cancel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key of %s: %w", e.id, err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{e.uri}}, key)
	if err != nil {
		return nil, fmt.Errorf("request leaf of %s: %w", e.id, err)
	}
	chain, err := l.sign(ctx, e.id, csr)
	if err != nil {
		return nil, fmt.Errorf("request leaf of %s: %w", e.id, err)
	}
	if err := checkSize(len(chain), func(i int) int { return len(chain[i]) }); err != nil {
		return nil, fmt.Errorf("take leaf of %s: %w", e.id, err)
	}
	cert, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, fmt.Errorf("take leaf of %s: %w", e.id, err)
	}
	notAfter := cert.NotAfter
	for _, der := range chain[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("take leaf of %s: %w", e.id, err)
		}
		notAfter = earlier(notAfter, c.NotAfter)
	}
	id, err := leafID(cert)
	switch {
	case err != nil:
		return nil, fmt.Errorf("take leaf of %s: %w", e.id, err)
	case id.String() != e.id:
		return nil, refuse(flow.ReasonPeerMismatch, "take leaf of %s: it names %s", e.id, id)
	case !key.PublicKey.Equal(cert.PublicKey):
		return nil, fmt.Errorf("take leaf of %s: it is over another key", e.id)
	case !time.Now().Before(notAfter):
		return nil, fmt.Errorf("take leaf of %s: it ended at %s", e.id, notAfter.UTC().Format(time.RFC3339))
	}
	return &Leaf{
		Certificate: tls.Certificate{Certificate: chain, PrivateKey: key, Leaf: cert},
		ID:          e.id, Serial: Serial(cert.SerialNumber), Thumbprint: sha256.Sum256(cert.Raw), NotAfter: notAfter,
	}, nil
}

// ServerName is the TLS server name (RFC 6066) under which a client asks a
// tunnel for an identity: a DNS name made of the ID's digest, because an ID
// is none. It tells an observer no more than the certificate's presence
// would to one who can guess the ID.
func ServerName(id string) string {
	digest := sha256.Sum256([]byte(id))
	return hex.EncodeToString(digest[:16]) + ".id.sallyport"
}
