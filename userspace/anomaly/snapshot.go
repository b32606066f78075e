// SPDX-License-Identifier: Apache-2.0

package anomaly

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"time"
)

// The stored form: magic, version, SHA-256 of the rest; then the seed of the
// hashes, the spaces, the endpoints and, from version 2 on, the paces, everything little-endian. It holds
// hashes and counts; whoever reads it also reads the seed and could try
// likely values against the 31-bit hashes, so the file is the owner's alone.
const (
	fileName        = "baselines"
	fileMagic       = "sallyport baselines\n"
	fileVersion     = 2
	maxFile         = 64 << 20
	maxStoredString = maxKeyLength
)

var order = binary.LittleEndian

// Save writes the baselines to the state directory: to a temporary file that
// replaces the old one once it is on the disk.
func (s *Scorer) Save() error {
	if s.opt.StateDir == "" {
		return nil
	}
	s.save.Lock()
	defer s.save.Unlock()
	data := s.encode()
	path := filepath.Join(s.opt.StateDir, fileName)
	if err := replaceFile(path, data); err != nil {
		return fmt.Errorf("save baselines to %s: %w", path, err)
	}
	return nil
}

func replaceFile(path string, data []byte) error {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Run saves the baselines every so often until ctx ends, and then once more.
func (s *Scorer) Run(ctx context.Context, every time.Duration) error {
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return s.Save()
		case <-t.C:
			if err := s.Save(); err != nil {
				s.opt.Logger.Error("save baselines", "error", err)
			}
		}
	}
}

// Close saves the baselines.
func (s *Scorer) Close() error { return s.Save() }

// load reads the stored baselines whole, or sets them aside.
func (s *Scorer) load() error {
	path := filepath.Join(s.opt.StateDir, fileName)
	data, err := readBounded(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = s.decode(data)
	} else if !errors.Is(err, ErrDamaged) {
		return fmt.Errorf("read baselines %s: %w", path, err)
	}
	if err == nil {
		return nil
	}
	s.clear(newSeed())
	aside := path + ".damaged"
	if rerr := os.Rename(path, aside); rerr != nil {
		return fmt.Errorf("set damaged baselines %s aside: %w", path, rerr)
	}
	return fmt.Errorf("%w: %s was set aside as %s, learning starts anew: %w", ErrDamaged, path, aside, err)
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("%w: larger than %d bytes", ErrDamaged, maxFile)
	}
	return data, nil
}

func (s *Scorer) encode() []byte {
	b := order.AppendUint64(nil, s.seed[0])
	b = order.AppendUint64(b, s.seed[1])
	spaces := *s.spaces.Load()
	b = order.AppendUint32(b, uint32(len(spaces)))
	for _, sp := range spaces {
		sp.mu.Lock()
		b = order.AppendUint64(b, sp.hash)
		b = appendString(b, sp.api)
		b = appendFixed(b, &sp.life)
		b = order.AppendUint32(b, sp.endpoints)
		b = appendFixed(b, &sp.fresh)
		b = appendFixed(b, &sp.waiting)
		sp.mu.Unlock()
	}
	var all []*endpoint
	s.each(func(e *endpoint) { all = append(all, e) })
	b = order.AppendUint32(b, uint32(len(all)))
	for _, e := range all {
		e.mu.Lock()
		st, labels := e.state, e.labels
		copied := append([]parameter(nil), e.params...)
		e.mu.Unlock()
		b = order.AppendUint64(b, e.hash)
		b = order.AppendUint64(b, e.space)
		b = appendString(b, e.api)
		b = appendString(b, e.method)
		b = appendString(b, e.name)
		b = appendFixed(b, &st)
		for i := range copied {
			b = appendString(b, labels[i])
			b = appendFixed(b, &copied[i])
		}
	}
	paces := *s.paces.Load()
	b = order.AppendUint32(b, uint32(len(paces)))
	for h, p := range paces {
		p.mu.Lock()
		b = order.AppendUint64(b, h)
		b = appendString(b, p.api)
		b = appendFixed(b, &p.state)
		p.mu.Unlock()
	}
	sum := sha256.Sum256(b)
	head := append([]byte(fileMagic), 0, 0, 0, 0)
	order.PutUint32(head[len(fileMagic):], fileVersion)
	head = append(head, sum[:]...)
	return append(head, b...)
}

func appendString(b []byte, v string) []byte {
	return append(order.AppendUint16(b, uint16(len(v))), v...)
}

func appendFixed(b []byte, v any) []byte {
	out, err := binary.Append(b, order, v)
	if err != nil {
		panic(err) // v is always a pointer to a struct of fixed size
	}
	return out
}

// reader takes a stored form apart; after the first error everything is zero.
type reader struct {
	b   []byte
	err error
}

func (r *reader) take(n int) []byte {
	if r.err == nil && n > len(r.b) {
		r.err = io.ErrUnexpectedEOF
	}
	if r.err != nil {
		return nil
	}
	out := r.b[:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) uint16() uint16 {
	if b := r.take(2); b != nil {
		return order.Uint16(b)
	}
	return 0
}

func (r *reader) uint32() uint32 {
	if b := r.take(4); b != nil {
		return order.Uint32(b)
	}
	return 0
}

func (r *reader) uint64() uint64 {
	if b := r.take(8); b != nil {
		return order.Uint64(b)
	}
	return 0
}

func (r *reader) string() string {
	n := int(r.uint16())
	if n > maxStoredString && r.err == nil {
		r.err = errors.New("a name is too long")
	}
	return string(r.take(n))
}

func (r *reader) fixed(v any) {
	if b := r.take(binary.Size(v)); b != nil {
		if _, err := binary.Decode(b, order, v); err != nil {
			r.err = err
		}
	}
}

func (r *reader) check(ok bool, what string) {
	if !ok && r.err == nil {
		r.err = errors.New(what)
	}
}

// decode replaces the (empty) baselines of s by the stored ones.
func (s *Scorer) decode(data []byte) error {
	r := &reader{b: data}
	r.check(string(r.take(len(fileMagic))) == fileMagic, "not a baseline file")
	version := r.uint32()
	if r.err == nil && (version < 1 || version > fileVersion) {
		return fmt.Errorf("version %d is not known, only 1 to %d", version, fileVersion)
	}
	var want [sha256.Size]byte
	copy(want[:], r.take(sha256.Size))
	r.check(sha256.Sum256(r.b) == want, "the checksum does not match")
	if r.err != nil {
		return r.err
	}
	s.clear([2]uint64{r.uint64() | 1, r.uint64() | 1})
	s.decodeSpaces(r)
	s.decodeEndpoints(r)
	if version > 1 {
		s.decodePaces(r)
	}
	r.check(len(r.b) == 0, "more than was expected")
	return r.err
}

func (s *Scorer) decodeSpaces(r *reader) {
	n := int(r.uint32())
	r.check(n <= maxSpaces, "too many spaces")
	spaces := map[uint64]*space{}
	for range n {
		if r.err != nil {
			return
		}
		sp := &space{hash: r.uint64(), api: r.string()}
		r.fixed(&sp.life)
		sp.endpoints = r.uint32()
		r.fixed(&sp.fresh)
		r.fixed(&sp.waiting)
		r.check(sp.life.valid() && validQuarantine(sp.waiting[:]), "a space's counts are out of range")
		spaces[sp.hash] = sp
	}
	s.spaces.Store(&spaces)
}

func (s *Scorer) decodePaces(r *reader) {
	n := int(r.uint32())
	r.check(n <= maxPaces, "too many paces")
	paces := map[uint64]*pace{}
	for range n {
		if r.err != nil {
			return
		}
		h := r.uint64()
		p := &pace{api: r.string(), limit: 1}
		r.fixed(&p.state)
		r.check(p.state.valid(), "a policy's pace is out of range")
		paces[h] = p
	}
	s.paces.Store(&paces)
}

func (s *Scorer) decodeEndpoints(r *reader) {
	n := int(r.uint32())
	r.check(n <= maxEndpoints, "too many endpoints")
	for range n {
		if r.err != nil {
			return
		}
		e := &endpoint{hash: r.uint64(), space: r.uint64(), api: r.string(), method: r.string(), name: r.string()}
		r.fixed(&e.state)
		r.check(e.state.valid(), "an endpoint's counts are out of range")
		if r.err != nil {
			return
		}
		for i := range int(e.state.Params) {
			e.labels[i] = r.string()
			r.check(len(e.labels[i]) <= maxLabel, "a parameter's name is too long")
			var p parameter
			r.fixed(&p)
			r.check(p.valid(), "a parameter's counts are out of range")
			e.params = append(e.params, p)
		}
		m := *s.shards[e.hash%shardCount].m.Load()
		r.check(m[e.hash] == nil, "an endpoint comes twice")
		m[e.hash] = e // nobody else sees the map yet
		s.count.Add(1)
	}
}

func (l *life) valid() bool { return l.Known <= maxKnown }

func validQuarantine(q []quarantined) bool {
	for i := range q {
		if int(q[i].Known) > len(q[i].Identities) {
			return false
		}
	}
	return true
}

func (st *state) valid() bool {
	ok := st.Life.valid() && st.Params <= maxParameters && st.Extras <= maxExtras && st.Learned <= ageAt &&
		validQuarantine(st.Quarantine[:]) && finite(st.Whole.Highest) && st.Sets.New.valid() && st.NewNames.valid()
	for i := range st.Components {
		ok = ok && finite(st.Components[i].Highest)
	}
	return ok
}

func (v *novelty) valid() bool { return v.Total <= ageAt && v.Misses <= v.Total && v.Tries <= v.Total }

func (p *parameter) valid() bool {
	ok := p.Values <= ageAt && finite(p.Sums.Highest) && p.Sums.Total <= ageAt && p.Shapes.New.valid() && p.Kinds.New.valid()
	for _, h := range p.Highest {
		ok = ok && finite(h)
	}
	return ok
}

func finite(f float32) bool { return f >= 0 && f <= math.MaxFloat32 }
