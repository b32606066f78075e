// SPDX-License-Identifier: Apache-2.0

package anomaly

import (
	"math/bits"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

const (
	maxFeatures = 64 // parameters of one request that are looked at
	maxLabel    = 16 // bytes of a parameter's name that are kept
)

// feature is what is known of one parameter's value: nothing that it could
// be restored from.
type feature struct {
	name    uint64
	value   uint64
	shape   uint64
	symbols uint64              // which symbols occur, by bit
	twice   uint32              // which punctuation occurs more than once
	length  uint32              // decoded bytes
	pairs   uint64              // which pairs of classes follow each other, by bit
	bits    [valueParts]float32 // of each part, once scored
	sum     float64             // of those that count together
	mark    bool                // only its presence counts
	label   [maxLabel]byte
	labels  uint8
}

// Sample is a request taken apart. It is about 7 KiB, owned by the caller
// and made to be reused; it keeps references into the request until the next
// Read.
type Sample struct {
	key      Key
	time     time.Time
	path     string
	policy   uint64 // hash of the API's name
	hash     uint64 // of the endpoint
	space    uint64 // of the API, method and template
	derived  bool   // the endpoint comes from the path, not from the template
	n        int
	features [maxFeatures]feature

	scored  bool // what follows is set
	score   Score
	bits    [partCount]float64
	which   [partCount]uint8
	maximum bool
	acc     accumulator
}

// Read takes req apart. Method and path are the request's own; the
// parameters are those of the path, the query and, where the content type
// says form or JSON, of req.Body.
func (s *Scorer) Read(sm *Sample, key Key, req *flow.Request) {
	if key.Warmup.Requests <= 0 {
		key.Warmup.Requests = defaultRequests
	}
	if key.Warmup.Identities <= 0 {
		key.Warmup.Identities = defaultIdentities
	}
	sm.key, sm.time, sm.path = key, req.Time, req.Path
	sm.n, sm.scored, sm.maximum = 0, false, false
	sm.derived = key.Template == "" || strings.IndexByte(key.Template, '*') >= 0
	h := s.start(tagAPI)
	h = s.addString(h, key.API)
	sm.policy = h
	sm.space = s.addString(s.addString(h^tagTemplate, key.Template), "")
	h = s.addString(h^tagMethod, key.Method)
	if sm.derived {
		sm.hash = s.readPath(sm, h)
	} else {
		sm.hash = s.addString(h^tagTemplate, key.Template)
		s.readTemplate(sm)
	}
	s.readPairs(sm, tagQuery, req.Query)
	if len(req.Body) > 0 {
		s.readBody(sm, req)
	}
	s.markRepeats(sm)
}

// readPath hashes the path with number-like segments folded; those become
// parameters named by their position.
func (s *Scorer) readPath(sm *Sample, h uint64) uint64 {
	rest, at := sm.path, uint64(0)
	for rest != "" {
		var seg string
		seg, rest = nextSegment(rest)
		at++
		k := foldSegment(seg)
		if k == "" {
			h = s.addString(h^tagSegment, seg)
			continue
		}
		h = s.step(h, uint64(k[1])<<8|tagPath)
		if a := sm.begin(s, fold(s.start(tagPath)^at, mix1), k); a != nil {
			addDecoded(a, seg, false)
			sm.end(a)
		}
	}
	return h
}

// name builds what readPath hashed, as a template: for a new endpoint only.
func (sm *Sample) name() string {
	if !sm.derived {
		return clip(sm.key.Template)
	}
	var b strings.Builder
	rest := sm.path
	for rest != "" && b.Len() < maxKeyLength {
		var seg string
		seg, rest = nextSegment(rest)
		b.WriteByte('/')
		if k := foldSegment(seg); k != "" {
			seg = k
		}
		b.WriteString(seg)
	}
	return clip(b.String())
}

// readTemplate takes the values of the template's placeholders.
func (s *Scorer) readTemplate(sm *Sample) {
	t, p := sm.key.Template, sm.path
	for t != "" && p != "" {
		var ts, ps string
		ts, t = nextSegment(t)
		ps, p = nextSegment(p)
		if len(ts) < 2 || ts[0] != '{' {
			continue
		}
		if a := sm.begin(s, s.hashString(tagPath, ts), ts); a != nil {
			addDecoded(a, ps, false)
			sm.end(a)
		}
	}
}

func nextSegment(p string) (seg, rest string) {
	p = strings.TrimPrefix(p, "/")
	if i := strings.IndexByte(p, '/'); i >= 0 {
		return p[:i], p[i:]
	}
	return p, ""
}

// foldSegment returns "{n}" for a number, "{id}" for what looks like an
// identifier (mostly digits or hexadecimal, at least eight characters, one of
// them a digit), "" for a word.
func foldSegment(seg string) string {
	digits, hex := 0, 0
	for i := range len(seg) {
		switch c := seg[i]; {
		case '0' <= c && c <= '9':
			digits++
			hex++
		case 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F' || c == '-':
			hex++
		}
	}
	switch {
	case len(seg) == 0 || digits == 0:
		return ""
	case digits == len(seg):
		return "{n}"
	case len(seg) >= 8 && (hex == len(seg) || 2*digits >= len(seg)) && strings.IndexByte(seg, '.') < 0:
		return "{id}"
	}
	return ""
}

// readPairs takes apart name=value pairs joined by "&".
func (s *Scorer) readPairs(sm *Sample, tag uint64, q string) {
	for q != "" {
		var pair string
		if i := strings.IndexByte(q, '&'); i >= 0 {
			pair, q = q[:i], q[i+1:]
		} else {
			pair, q = q, ""
		}
		if pair == "" {
			continue
		}
		name, value := pair, ""
		if i := strings.IndexByte(pair, '='); i >= 0 {
			name, value = pair[:i], pair[i+1:]
		}
		a := sm.begin(s, s.decodedHash(tag, name), name)
		if a == nil {
			return
		}
		addDecoded(a, value, true)
		sm.end(a)
	}
}

func (s *Scorer) decodedHash(tag uint64, name string) uint64 {
	if strings.IndexByte(name, '%') < 0 && strings.IndexByte(name, '+') < 0 {
		b := byteHash{s: s, h: s.start(tag)}
		for i := range len(name) {
			b.add(name[i])
		}
		return b.sum()
	}
	b := byteHash{s: s, h: s.start(tag)}
	for i := 0; i < len(name); i++ {
		c, used, _ := decode(name[i:], true)
		b.add(c)
		i += used - 1
	}
	return b.sum()
}

// decode returns the first byte of v after percent-decoding and how many
// bytes it took; needless says that an unreserved character was encoded.
func decode(v string, plus bool) (c byte, used int, needless bool) {
	c = v[0]
	if c == '+' && plus {
		return ' ', 1, false
	}
	if c != '%' || len(v) < 3 {
		return c, 1, false
	}
	hi, lo := unhex[v[1]], unhex[v[2]]
	if hi|lo > 15 {
		return c, 1, false
	}
	c = hi<<4 | lo
	return c, 3, classes[c].symbol <= symbolDigit
}

func addDecoded(a *accumulator, v string, plus bool) {
	for i := 0; i < len(v); i++ {
		c := v[i]
		if c != '%' && (c != '+' || !plus) {
			a.add(c)
			continue
		}
		c, used, needless := decode(v[i:], plus)
		a.add(c)
		if needless {
			a.symbols |= 1 << symbolNeedless
		}
		i += used - 1
	}
}

// mark records a fact of the whole request as a parameter without value.
func (s *Scorer) mark(sm *Sample, what uint64, label string) {
	if sm.n == maxFeatures {
		return
	}
	f := &sm.features[sm.n]
	*f = feature{name: fold(s.start(tagMark)^what, mix2), mark: true}
	f.labels = uint8(copy(f.label[:], label))
	sm.n++
}

func (s *Scorer) markRepeats(sm *Sample) {
	for i := 1; i < sm.n; i++ {
		for j := range i {
			if sm.features[i].name == sm.features[j].name {
				s.mark(sm, 1, "(repeated)")
				return
			}
		}
	}
}

// accumulator builds one feature while its value is decoded byte by byte.
type accumulator struct {
	f                *feature
	hash             byteHash
	symbols, pairs   uint64
	twice            uint64
	shape, multiply  uint64
	length           uint32
	lastClass, token uint8
	tokens           uint8
}

// begin starts a parameter; nil when there are too many already, which is
// marked.
func (sm *Sample) begin(s *Scorer, name uint64, label string) *accumulator {
	if sm.n >= maxFeatures-3 { // room for marks
		if !sm.maximum {
			sm.maximum = true
			s.mark(sm, 2, "(many)")
		}
		return nil
	}
	f := &sm.features[sm.n]
	f.name, f.mark = name, false
	f.sum, f.bits = 0, [valueParts]float32{}
	f.labels = uint8(copy(f.label[:], label))
	sm.acc = accumulator{f: f, hash: byteHash{s: s, h: s.start(tagValue)}, multiply: s.seed[0] | 1, token: 255}
	return &sm.acc
}

func (a *accumulator) add(c byte) {
	k := classes[c]
	bit := uint64(1) << k.symbol
	a.twice |= a.symbols & bit
	a.symbols |= bit
	a.pairs |= 1 << (a.lastClass*classCount + k.class)
	a.lastClass = k.class
	if k.token != a.token {
		a.token = k.token
		if a.tokens < maxTokens {
			a.tokens++
			a.shape = (a.shape + uint64(k.token) + 1) * a.multiply
		}
	}
	a.length++
	a.hash.add(c)
}

func (sm *Sample) end(a *accumulator) {
	f := a.f
	f.value = a.hash.sum()
	f.shape = bits.RotateLeft64(a.shape, 32) * mix1
	f.symbols = a.symbols
	f.twice = uint32(a.twice >> symbolPunctuation)
	f.pairs = a.pairs | 1<<(a.lastClass*classCount+classEdge)
	f.length = a.length
	sm.n++
}
