// SPDX-License-Identifier: Apache-2.0

package keys

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// Bounds of what is fetched.
const (
	MaxDocument = 256 << 10 // bytes of a key set
	MaxSources  = 1024
	parallel    = 8 // fetches over the network at once
)

// Source says where the keys of one issuer are: exactly one of URL, File and
// Document.
type Source struct {
	Issuer   string // namespace/name of the TokenIssuer
	URL      string // https only
	File     string // absolute path, read again when it changes
	Document []byte // written in the policy
	// Tenant says that the policy is not the node's own: then the URL's host
	// must be one that Options.AllowHost names, and no address that it
	// resolves to may be of this node or its network's own services.
	Tenant bool
}

// Options are what a Fetcher needs from outside.
type Options struct {
	// Deliver is called with every document that was got and when, or with a
	// nil document, the time of the last one (zero: never) and why there is
	// no newer one. Calls for one issuer come one after another. It must not
	// call the Fetcher nor keep the document's bytes to write to them.
	Deliver func(issuer string, document []byte, fetched time.Time, err error)
	// AllowHost says which hosts a tenant's URL may name; nil: none.
	AllowHost func(host string) bool
	// RootCAs are the CAs of issuers; nil: the system's.
	RootCAs *x509.CertPool
	// Interval is the time between two fetches; 0: 5 minutes. A tenth of it
	// is random, so that a fleet does not ask at once.
	Interval time.Duration
	// LeastInterval is the least time between two fetches of one issuer,
	// whoever asks for them; 0: 10 s. A failed one is tried again after it,
	// then after twice that, up to Interval.
	LeastInterval time.Duration
	// Timeout bounds one fetch, from the look-up to the last byte; 0: 10 s.
	Timeout time.Duration
	// Poll is how often a file's change is looked for; 0: 1 s.
	Poll time.Duration
	Log  *slog.Logger // nil: none
}

// Status is what status shows of one source.
type Status struct {
	Issuer    string
	From      string    // the URL, the path, or "policy"
	Fetched   time.Time // of the document in use, zero if there is none
	Attempted time.Time
	Attempts  uint64
	Problem   string // why the last attempt failed, "" if it did not
}

// Fetcher keeps the key sets of its sources fresh. Its methods are safe for
// concurrent use.
type Fetcher struct {
	opt   Options
	fetch *client
	slots chan struct{}

	mu      sync.Mutex
	ctx     context.Context
	stop    context.CancelFunc
	sources map[string]*source
	running sync.WaitGroup
}

// source is a Source that is looked after by a goroutine of its own.
type source struct {
	Source
	stop context.CancelFunc
	wake chan struct{} // a refresh is asked for

	mu        sync.Mutex // also orders what is delivered
	gone      bool       // stopped: nothing is delivered any more
	document  []byte
	validator validator
	seen      fileMark
	fetched   time.Time
	attempted time.Time
	attempts  uint64
	problem   error
}

// New returns a Fetcher without sources.
func New(opt Options) *Fetcher {
	if opt.Interval <= 0 {
		opt.Interval = 5 * time.Minute
	}
	if opt.LeastInterval <= 0 {
		opt.LeastInterval = 10 * time.Second
	}
	if opt.Timeout <= 0 {
		opt.Timeout = 10 * time.Second
	}
	if opt.Poll <= 0 {
		opt.Poll = time.Second
	}
	if opt.AllowHost == nil {
		opt.AllowHost = func(string) bool { return false }
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	f := &Fetcher{opt: opt, slots: make(chan struct{}, parallel), sources: make(map[string]*source)}
	f.fetch = newClient(&f.opt)
	f.ctx, f.stop = context.WithCancel(context.Background())
	return f
}

// Check says whether a source can be used, as SetSources would.
func (f *Fetcher) Check(s Source) error {
	given := 0
	for _, there := range [...]bool{s.URL != "", s.File != "", s.Document != nil} {
		if there {
			given++
		}
	}
	switch {
	case s.Issuer == "":
		return errors.New("check key source: it names no issuer")
	case given != 1:
		return fmt.Errorf("check key source of %s: it wants exactly one of a URL, a file and a document", s.Issuer)
	case len(s.Document) > MaxDocument:
		return fmt.Errorf("check key source of %s: its document is over %d bytes", s.Issuer, MaxDocument)
	case s.File != "" && (!filepath.IsAbs(s.File) || s.Tenant):
		return fmt.Errorf("check key source of %s: a file wants an absolute path, in a policy of this node's own", s.Issuer)
	case s.URL == "":
		return nil
	}
	u, err := url.Parse(s.URL)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.Fragment != "" {
		return fmt.Errorf("check key source of %s: its URL is not https://HOST/PATH without user and fragment", s.Issuer)
	}
	if err := f.fetch.permits(u.Hostname(), s.Tenant); err != nil {
		return fmt.Errorf("check key source of %s: %w", s.Issuer, err)
	}
	return nil
}

// SetSources replaces the sources, all or none. A new or changed one is
// fetched at once; one that stays as it is goes on undisturbed.
func (f *Fetcher) SetSources(list []Source) error {
	if len(list) > MaxSources {
		return fmt.Errorf("set key sources: %d are more than %d", len(list), MaxSources)
	}
	next := make(map[string]Source, len(list))
	for _, s := range list {
		if err := f.Check(s); err != nil {
			return err
		}
		if _, twice := next[s.Issuer]; twice {
			return fmt.Errorf("set key sources: two are of issuer %s", s.Issuer)
		}
		next[s.Issuer] = s
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ctx.Err() != nil {
		return errors.New("set key sources: the fetcher is closed")
	}
	for name, old := range f.sources {
		if s, stays := next[name]; stays && old.same(&s) {
			delete(next, name)
			continue
		}
		old.end()
		delete(f.sources, name)
	}
	for name, s := range next {
		one := &source{Source: s, wake: make(chan struct{}, 1)}
		one.Document = slices.Clone(s.Document)
		var ctx context.Context
		ctx, one.stop = context.WithCancel(f.ctx)
		f.sources[name] = one
		f.running.Go(func() { f.keep(ctx, one) })
	}
	return nil
}

func (s *source) same(b *Source) bool {
	return s.URL == b.URL && s.File == b.File && s.Tenant == b.Tenant && (s.Document == nil) == (b.Document == nil) &&
		slices.Equal(s.Document, b.Document)
}

func (s *source) end() {
	s.stop()
	s.mu.Lock()
	s.gone = true
	s.mu.Unlock()
}

// Refresh asks for an issuer's keys now, because one that it lacks was named
// in a token. However often it is called, they are fetched at most once in
// Options.LeastInterval. It does not block.
func (f *Fetcher) Refresh(issuer string) error {
	f.mu.Lock()
	s := f.sources[issuer]
	f.mu.Unlock()
	if s == nil {
		return fmt.Errorf("refresh keys of %s: there is no such issuer", issuer)
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
	return nil
}

// Replay delivers again what every source has, to a process that has just started.
func (f *Fetcher) Replay() {
	f.mu.Lock()
	all := make([]*source, 0, len(f.sources))
	for _, s := range f.sources {
		all = append(all, s)
	}
	f.mu.Unlock()
	for _, s := range all {
		s.mu.Lock()
		if !s.gone && s.document != nil {
			f.opt.Deliver(s.Issuer, s.document, s.fetched, nil)
		}
		if !s.gone && s.problem != nil {
			f.opt.Deliver(s.Issuer, nil, s.fetched, s.problem)
		}
		s.mu.Unlock()
	}
}

// Status returns one entry a source, ordered by issuer.
func (f *Fetcher) Status() []Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]Status, 0, len(f.sources))
	for _, s := range f.sources {
		s.mu.Lock()
		one := Status{Issuer: s.Issuer, From: s.from(), Fetched: s.fetched, Attempted: s.attempted, Attempts: s.attempts}
		if s.problem != nil {
			one.Problem = s.problem.Error()
		}
		s.mu.Unlock()
		out = append(out, one)
	}
	slices.SortFunc(out, func(a, b Status) int {
		if a.Issuer < b.Issuer {
			return -1
		}
		return 1
	})
	return out
}

func (s *source) from() string {
	switch {
	case s.URL != "":
		return s.URL
	case s.File != "":
		return s.File
	}
	return "policy"
}

// Close stops every fetch and waits for them to end.
func (f *Fetcher) Close() {
	f.mu.Lock()
	f.stop()
	for name, s := range f.sources {
		s.end()
		delete(f.sources, name)
	}
	f.mu.Unlock()
	f.running.Wait()
	f.fetch.close()
}

// keep fetches a source until its end.
func (f *Fetcher) keep(ctx context.Context, s *source) {
	failures := 0
	for {
		if f.attempt(ctx, s) {
			failures = 0
		} else {
			failures++
		}
		if !f.pause(ctx, s, f.wait(failures)) {
			return
		}
	}
}

// wait returns how long to wait after so many failures in a row.
func (f *Fetcher) wait(failures int) time.Duration {
	d := f.opt.Interval
	if failures > 0 {
		d = max(f.opt.LeastInterval, min(d, f.opt.LeastInterval<<min(failures-1, 16)))
		return d + time.Duration(rand.Int64N(int64(d)/10+1))
	}
	return d - time.Duration(rand.Int64N(int64(d)/10+1))
}

// pause waits, less long where a refresh is asked for or the file changes,
// and says whether to go on.
func (f *Fetcher) pause(ctx context.Context, s *source, d time.Duration) bool {
	end := time.NewTimer(d)
	defer end.Stop()
	var change <-chan time.Time
	if s.File != "" {
		poll := time.NewTicker(f.opt.Poll)
		defer poll.Stop()
		change = poll.C
	}
	wake := s.wake
	for {
		select {
		case <-ctx.Done():
			return false
		case <-end.C:
			return true
		case <-wake:
			// What is asked for too soon is done as soon as it may be.
			wake = nil
			if s.URL == "" {
				return true
			}
			end.Reset(max(0, f.opt.LeastInterval-time.Since(s.lastAttempt())))
		case <-change:
			if s.changed() {
				return true
			}
		}
	}
}

func (s *source) lastAttempt() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.attempted
}

// attempt gets the document once and delivers what came of it.
func (f *Fetcher) attempt(ctx context.Context, s *source) bool {
	s.mu.Lock()
	s.attempted = time.Now()
	s.attempts++
	had := s.validator
	s.mu.Unlock()
	document, v, mark, err := f.get(ctx, s, had)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		return false
	}
	s.seen = mark
	if err != nil {
		first := s.problem == nil
		s.problem = fmt.Errorf("get keys of %s from %s: %w", s.Issuer, s.from(), err)
		if first {
			f.opt.Log.Warn("token keys not refreshed", "issuer", s.Issuer, "error", s.problem)
		}
		f.opt.Deliver(s.Issuer, nil, s.fetched, s.problem)
		return false
	}
	if document != nil {
		s.document, s.validator = document, v
	}
	s.fetched, s.problem = s.attempted, nil
	f.opt.Deliver(s.Issuer, s.document, s.fetched, nil)
	return true
}

// get returns a source's document, nil where it is the one that is there already.
func (f *Fetcher) get(ctx context.Context, s *source, had validator) ([]byte, validator, fileMark, error) {
	switch {
	case s.Document != nil:
		return s.Document, validator{}, fileMark{}, nil
	case s.File != "":
		document, mark, err := readFile(s.File)
		return document, validator{}, mark, err
	}
	select {
	case f.slots <- struct{}{}:
		defer func() { <-f.slots }()
	case <-ctx.Done():
		return nil, validator{}, fileMark{}, ctx.Err()
	}
	document, v, err := f.fetch.get(ctx, s.URL, s.Tenant, had)
	return document, v, fileMark{}, err
}
