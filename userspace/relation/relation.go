// SPDX-License-Identifier: Apache-2.0

package relation

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"time"
)

// Bounds of what an Engine holds and takes.
const (
	MaxTuples     = 100     // of one Write or Delete
	MaxListed     = 1000    // objects or tuples of one answer
	maxFileTuples = 100_000 // of Reconcile
)

// Options are what Open needs.
type Options struct {
	// StateDir holds the store, relation.db. The folder exists and is ours alone.
	StateDir string
	// TTL bounds how long an answer is served from the cache; 0: 60 s. Writes
	// void answers at once, whatever it is.
	TTL time.Duration
	// Timeout bounds one question to the engine; 0: 2 s.
	Timeout time.Duration
	// CacheEntries bounds the cache; 0: 65536.
	CacheEntries int
	// Parallel bounds the questions that the engine works on at once; 0: 8.
	Parallel int
	// Changed is told the model whose answers may have changed, after a write
	// or a new version of it, so that live connections can be judged again.
	// It must not block nor call the Engine. May be nil.
	Changed func(model string)
	// Dial connects to the engine of a model that is elsewhere, and returns the
	// pre-shared key that it is to be shown, "" for none. Nil: there is no way.
	Dial  func(ctx context.Context, model string) (conn net.Conn, secret string, err error)
	Roots *x509.CertPool // that the certificates of such engines lead to; nil: the system's
	Log   *slog.Logger   // nil: none
}

// Model is a RelationModel: its name (namespace/name) and its text, in
// OpenFGA's modelling language or as JSON; empty: the default
// model.
type Model struct {
	Name string
	Text string
	// Remote is where its engine is, nil for this process.
	Remote *Remote
}

// Remote is an OpenFGA server elsewhere, spoken to in TLS.
type Remote struct {
	Address string // HOST:PORT; the host is what its certificate must name
	Store   string // the name of the store
}

// Answer is whether the relation holds.
type Answer struct {
	Allowed bool
	// Until is when the answer may end by itself, because a lease of the
	// model begins or ends then; zero if it does not.
	Until time.Time
}

// Reconciled counts what Reconcile did.
type Reconciled struct {
	Written, Deleted int
	// Withheld are wanted tuples that an operator has deleted since they were
	// last written from files, and that stay deleted until the files stop
	// naming them or Write brings them back.
	Withheld int
}

// Status is what status shows of the engine.
type Status struct {
	Ready   bool
	Problem string // why it is not ready
	Models  int
	Checks  uint64 // questions that the engine worked on
	Errors  uint64 // of those, how many it could not answer
}

// ErrNoModel says that no relation model of the name is loaded, or that none
// was named where there is not exactly one.
var ErrNoModel = errors.New("no such relation model is loaded")

var (
	errUnavailable = errors.New("the relation engine is not available")
	errOverload    = errors.New("the relation engine is busy")
)

func (o *Options) defaults() {
	if o.TTL <= 0 {
		o.TTL = time.Minute
	}
	if o.Timeout <= 0 {
		o.Timeout = 2 * time.Second
	}
	if o.CacheEntries <= 0 {
		o.CacheEntries = 64 << 10
	}
	if o.Parallel <= 0 {
		o.Parallel = 8
	}
	if o.Changed == nil {
		o.Changed = func(string) {}
	}
	if o.Dial == nil {
		o.Dial = func(context.Context, string) (net.Conn, string, error) { return nil, "", errUnavailable }
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
}
