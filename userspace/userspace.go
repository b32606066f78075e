// SPDX-License-Identifier: Apache-2.0

// Package userspace is the unprivileged half as a process, and wiring only:
// it takes from the agent, over the line, what to listen on, whom to trust and
// what the policies say, hands it to the packages below, and asks the agent
// for what it has no privilege for.
package userspace

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/anomaly"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/line"
	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/obtain"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
	"github.com/sallyport-dev/sallyport/userspace/proxy"
	"github.com/sallyport-dev/sallyport/userspace/relation"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

const (
	// proofsEvery is how often it is tried to open the used proofs.
	proofsEvery = 5 * time.Second
	// openTimeout bounds opening the relation store, migrations included.
	openTimeout = 30 * time.Second
	// recordBatch is how many decision records go in one message.
	recordBatch = 128
	// recordBytes bounds a message of records, well below line.MaxMessage.
	recordBytes = 128 << 10
	// recordPause lets records gather, so that a busy proxy sends few messages.
	recordPause = 20 * time.Millisecond
	// saveInterval is how often baselines go to disk.
	saveInterval = time.Minute
)

// process is the running half.
type process struct {
	conn    *line.Conn
	start   *linepb.Start
	log     *slog.Logger
	version string
	boot    string // of the machine

	engine    *netloop.Engine
	proxy     *proxy.Proxy
	pipeline  *pipeline.Pipeline
	tokens    *token.Verifier
	relations *relation.Engine
	anomalies *anomaly.Scorer
	leaves    *identity.Leaves
	obtained  *obtain.Source
	verifier  *identity.Verifier
	flows     flows

	// Of the last messages about them, of their handler alone: what follows from
	// both.
	plan       *compile.Plan
	generation uint64   // of the plan
	local      []string // SPIFFE IDs
	roots      *x509.CertPool

	draining atomic.Bool
	lost     uint64 // decision records that could not be sent; of report alone
}

// Run is the whole life of the process: it speaks to the agent on the line
// until that or ctx ends, and returns once everything is closed. confine is called
// with the state directory as soon as that is known, nil for a test that is a
// process of its own purposes.
func Run(ctx context.Context, socket *line.Socket, version string, log *slog.Logger, confine func(stateDir string) error) error {
	p := &process{log: log, version: version}
	first, fds, err := socket.Recv()
	if err != nil {
		return fmt.Errorf("wait for the agent's first message: %w", err)
	}
	if len(fds) != 0 || first.GetStart() == nil {
		closeAll(fds)
		return errors.New("wait for the agent's first message: it is not a start")
	}
	p.start = first.GetStart()
	if p.roots, err = x509.SystemCertPool(); err != nil { // while files can be read
		log.Error("the system's certificates not read: no issuer is believed", "err", err)
		p.roots = x509.NewCertPool()
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return fmt.Errorf("read which boot this is: %w", err)
	}
	p.boot = string(boot)
	if confine != nil {
		if err := confine(p.start.GetStateDir()); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// The parts come up before anything is read from the line: a message
	// finds them whole.
	ready := make(chan struct{})
	p.conn = line.NewConn(socket, line.Options{
		Handle: func(ctx context.Context, in *line.Incoming) {
			<-ready
			p.handle(ctx, in)
		},
		Concurrent: concurrent,
		Logger:     log,
	})
	defer p.conn.Close()
	// Told to end (SIGTERM) is the same as left alone: nothing may be served
	// that nobody looks after.
	defer context.AfterFunc(ctx, func() { p.conn.Close() })() //nolint:errcheck // nothing to be done about it
	if err := p.open(ctx); err != nil {
		return err
	}
	defer p.close()
	var reopening sync.WaitGroup
	defer reopening.Wait() // it ends with the line, and leaves no file open behind close
	close(ready)
	if err := p.conn.Notify(&linepb.Message{Body: &linepb.Message_Ready{Ready: &linepb.Ready{Version: version}}}); err != nil {
		return fmt.Errorf("report ready: %w", err)
	}
	go p.pipeline.Run(ctx)
	go p.report(ctx)
	go p.save(ctx)
	reopening.Go(func() { p.reopenProofs(ctx) })
	line.Orphan{
		Listeners:   p.proxy.CloseListeners,
		Connections: func() { p.engine.Close() }, //nolint:errcheck // a second Close says so
		Draining:    p.draining.Load,
		Idle:        func() bool { return p.engine.Stats().Conns == 0 },
	}.Watch(p.conn)
	if p.draining.Load() {
		p.engine.Shutdown(ctx) //nolint:errcheck // what it cut is what ctx asked for
	}
	return nil
}

// openProofs opens the used proofs. Where they cannot be had everything else
// works; what needs a proof is denied, and status says why.
func (p *process) openProofs(ctx context.Context) *token.Proofs {
	proofs, err := token.OpenProofs(ctx, filepath.Join(p.start.GetStateDir(), "proofs"), p.boot, time.Now())
	if err != nil {
		return token.UnavailableProofs(err)
	}
	return proofs
}

// reopenProofs tries again until they can be had.
func (p *process) reopenProofs(ctx context.Context) {
	if !p.tokens.Proofs().Unavailable() {
		return
	}
	p.log.Error("used proofs not opened", "err", p.tokens.Proofs().Problem(time.Now()))
	again := time.NewTicker(proofsEvery)
	defer again.Stop()
	for p.tokens.Proofs().Unavailable() {
		select {
		case <-ctx.Done():
			return
		case <-p.conn.Done():
			return
		case <-again.C:
			p.tokens.SetProofs(p.openProofs(ctx))
		}
	}
	p.log.Info("used proofs opened")
}

func (p *process) open(ctx context.Context) error {
	var err error
	openCtx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	p.tokens = token.New(token.Options{Refresh: p.refreshKeys, Introspect: p.introspect, Proofs: p.openProofs(openCtx), Log: p.log})
	p.verifier = identity.NewVerifier(identity.VerifierOptions{})
	p.leaves = identity.NewLeaves(identity.LeavesOptions{Sign: p.sign, Log: p.log})
	p.obtained = obtain.New(obtain.Options{Leaves: p.leaves, Dial: p.dialIssuer, Roots: p.roots, Log: p.log})
	p.relations, err = relation.Open(openCtx, relation.Options{
		StateDir: p.start.GetStateDir(), Dial: p.dialEngine, Roots: p.roots,
		Changed: func(model string) {
			if p.pipeline != nil {
				p.pipeline.RelationsChanged(model)
			}
		},
		Log: p.log,
	})
	if err != nil {
		// Everything else works; what needs a relation is denied and
		// status says why.
		p.log.Error("relation store not opened", "err", err)
		p.relations = relation.Unavailable(err)
	}
	p.anomalies, err = anomaly.New(anomaly.Options{StateDir: p.start.GetStateDir(), Logger: p.log})
	if err != nil {
		p.log.Error("baselines not loaded", "err", err)
		if p.anomalies == nil {
			return err
		}
	}
	p.pipeline = pipeline.New(pipeline.Options{
		Node:      p.start.GetNode(),
		Ceiling:   flow.Mode(p.start.GetModeCeiling()),
		Tokens:    p.tokens,
		Relations: p.relations,
		Anomalies: p.anomalies,
		Revoked:   p.revoked,
		Logger:    p.log,
	})
	p.engine, err = netloop.New(netloop.Options{
		Loops:      int(p.start.GetLoops()),
		Goroutines: p.start.GetGoroutines(),
		Logger:     p.log,
	})
	if err != nil {
		return fmt.Errorf("start event loops: %w", err)
	}
	p.proxy = proxy.New(p.engine, proxy.Options{
		Pipeline: p.pipeline, Agent: agent{p.conn, p.log}, Flows: &p.flows, Leaves: p.leaves, Verifier: p.verifier, Obtained: p.obtained, Roots: p.roots,
		Anchor: anchorOf(p.start.GetAnchor()), Logger: p.log,
	})
	return nil
}

// anchorOf reads the word of flow.Anchor.
func anchorOf(word string) flow.Anchor {
	for _, a := range []flow.Anchor{flow.AnchorSoftware, flow.AnchorTPM} {
		if a.String() == word {
			return a
		}
	}
	return flow.AnchorNone
}

func (p *process) close() {
	p.proxy.CloseListeners()
	p.engine.Close() //nolint:errcheck // a second Close says so
	p.obtained.Close()
	p.leaves.Close()
	if err := p.relations.Close(); err != nil {
		p.log.Error("relation store not closed", "err", err)
	}
	if err := p.anomalies.Close(); err != nil {
		p.log.Error("baselines not saved", "err", err)
	}
	p.tokens.Proofs().Close() //nolint:errcheck // each was written as it came
}

// report sends decision records to the agent as they come.
func (p *process) report(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.conn.Done():
			return
		case <-p.pipeline.Wake():
		}
		for p.reportBatch() {
		}
		t := time.NewTimer(recordPause)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// reportBatch sends what is there, in messages that fit the line, and says
// whether there may be more.
func (p *process) reportBatch() bool {
	records, lost := p.pipeline.TakeRecords(recordBatch)
	lost, p.lost = lost+p.lost, 0
	if len(records) == 0 && lost == 0 {
		return false
	}
	for {
		n, size := 0, 0
		for n < len(records) && (n == 0 || size+len(records[n]) <= recordBytes) {
			size += len(records[n])
			n++
		}
		m := &linepb.Message{Body: &linepb.Message_Decisions{Decisions: &linepb.Decisions{Records: records[:n], Lost: lost}}}
		if err := p.conn.Notify(m); err != nil {
			p.log.Warn("decision records lost", "records", len(records), "err", err)
			p.lost = lost + uint64(len(records)) // said when the line takes messages again
			return false
		}
		records, lost = records[n:], 0
		if len(records) == 0 {
			return true
		}
	}
}

// save writes the baselines now and then.
func (p *process) save(ctx context.Context) {
	t := time.NewTicker(saveInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.conn.Done():
			return
		case <-t.C:
			if err := p.anomalies.Save(); err != nil {
				p.log.Error("baselines not saved", "err", err)
			}
		}
	}
}
