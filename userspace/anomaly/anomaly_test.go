// SPDX-License-Identifier: Apache-2.0

package anomaly

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func newScorer(t testing.TB) *Scorer {
	t.Helper()
	s, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// orders makes requests of one endpoint: an id in the path, a number, a word
// of three, free text, and now and then a second page.
type orders struct{ r *rand.Rand }

func newOrders(seed uint64) orders { return orders{rand.New(rand.NewPCG(seed, 1))} }

func (o orders) next(i int) *flow.Request {
	words := []string{"red", "green", "blue"}
	notes := []string{"please ring twice", "leave at the door", "no hurry", "call me", "thanks a lot"}
	q := fmt.Sprintf("qty=%d&color=%s&note=%s", 1+o.r.IntN(60), words[o.r.IntN(3)], strings.ReplaceAll(notes[o.r.IntN(len(notes))], " ", "+"))
	if o.r.IntN(6) == 0 {
		q += fmt.Sprintf("&page=%d", 1+o.r.IntN(5))
	}
	return request("GET", fmt.Sprintf("/v1/orders/%d", 100000+o.r.IntN(899999)), q, i)
}

func request(method, path, query string, i int) *flow.Request {
	return &flow.Request{Method: method, Path: path, Query: query, Time: start.Add(time.Duration(i) * time.Second)}
}

func ordersKey(n, identities int) Key {
	return Key{API: "shop/orders", Method: "GET", Template: "/v1/orders/{id}", Warmup: Warmup{Requests: n, Identities: identities}}
}

func learn(s *Scorer, sm *Sample, key Key, r *flow.Request, who string) Score {
	s.Read(sm, key, r)
	sc := s.Score(sm)
	s.Learn(sm, who)
	return sc
}

func score(s *Scorer, sm *Sample, key Key, r *flow.Request) Score {
	s.Read(sm, key, r)
	return s.Score(sm)
}

var attacks = []struct{ name, path, query string }{
	{"SQL in the path", "/v1/orders/1'%20OR%20'1'='1", "qty=3&color=red&note=no+hurry"},
	{"SQL in a number", "/v1/orders/123456", "qty=3'+OR+'1'%3D'1&color=red&note=no+hurry"},
	{"SQL in a word", "/v1/orders/123456", "qty=3&color=red';drop+table+users--&note=no+hurry"},
	{"script in free text", "/v1/orders/123456", "qty=3&color=red&note=<script>alert(1)</script>"},
	{"script, encoded", "/v1/orders/123456", "qty=3&color=red&note=%3Cscript%3Ealert(1)%3C%2Fscript%3E"},
	{"path traversal", "/v1/orders/123456", "qty=3&color=../../../../etc/passwd&note=no+hurry"},
	{"template injection", "/v1/orders/123456", "qty=${7*7}&color=red&note=no+hurry"},
	{"a new parameter", "/v1/orders/123456", "qty=3&color=red&note=no+hurry&admin=true"},
	{"a parameter less", "/v1/orders/123456", "color=red&note=no+hurry"},
	{"a value never seen", "/v1/orders/123456", "qty=3&color=ultraviolet&note=no+hurry"},
	{"NUL", "/v1/orders/123456", "qty=3%00&color=red&note=no+hurry"},
	{"overlong", "/v1/orders/123456", "qty=3&color=red&note=" + strings.Repeat("a", 3000)},
	{"needless encoding", "/v1/orders/123456", "qty=3&color=%72%65%64&note=no+hurry"},
}

// TestAttacks learns a warm-up and scores injections: P must be under what a
// policy can set after so few requests.
func TestAttacks(t *testing.T) {
	for _, n := range []int{60, 200, 2000} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			s, o, key := newScorer(t), newOrders(uint64(n)), ordersKey(n, 1)
			var sm Sample
			for i := range n {
				learn(s, &sm, key, o.next(i), "one")
			}
			limit := 0.04
			if n >= 200 {
				limit = 0.02
			}
			if n >= 2000 {
				limit = 0.003
			}
			for _, a := range attacks {
				sc := score(s, &sm, key, request("GET", a.path, a.query, n))
				if !sc.Warm || sc.P > limit {
					t.Errorf("%s: P %.4f (N %d, warm %v, evidence %.1f), want at most %.3f: %v", a.name, sc.P, sc.N, sc.Warm, sc.Evidence, limit, sc.Components)
				}
				if sc.P < 1/float64(sc.N+1) {
					t.Errorf("%s: P %.5f is below 1/(%d+1)", a.name, sc.P, sc.N)
				}
			}
			before := s.List()[0]
			if n >= 200 && before.Unusual < uint64(len(attacks)) {
				t.Errorf("%d scores counted as unusual, want the %d attacks", before.Unusual, len(attacks))
			}
			low := 0
			for i := range 1000 {
				if score(s, &sm, key, o.next(n+i)).P <= limit {
					low++
				}
			}
			after := s.List()[0]
			if after.Scored != before.Scored+1000 || after.Unusual > before.Unusual+uint64(low) {
				t.Errorf("%d normal requests counted as %d, %d unusual", 1000, after.Scored-before.Scored, after.Unusual-before.Unusual)
			}
			if share := float64(low) / 1000; share > 1.1*limit+0.01 {
				t.Errorf("%.3f of normal requests have P <= %.3f", share, limit)
			}
		})
	}
}

// TestWarmup holds Warm against both of its conditions.
func TestWarmup(t *testing.T) {
	for _, c := range []struct {
		name                            string
		requests, identities, sent, who int
		warm                            bool
	}{
		{"too few requests", 50, 1, 49, 1, false},
		{"enough", 50, 1, 50, 1, true},
		{"too few identities", 50, 3, 80, 2, false},
		{"enough identities", 50, 3, 80, 3, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, o, key := newScorer(t), newOrders(7), ordersKey(c.requests, c.identities)
			var sm Sample
			for i := range c.sent {
				learn(s, &sm, key, o.next(i), fmt.Sprint("id", i%c.who))
			}
			if sc := score(s, &sm, key, o.next(c.sent)); sc.Warm != c.warm {
				t.Errorf("warm %v, want %v", sc.Warm, c.warm)
			}
		})
	}
	s := newScorer(t)
	var sm Sample
	if sc := score(s, &sm, ordersKey(1, 1), newOrders(1).next(0)); sc.Warm || sc.P != 1 || sc.N != 0 {
		t.Errorf("an endpoint without baseline: %+v", sc)
	}
}

// TestComponents checks that an explanation names what stood out, and nothing
// of a value.
func TestComponents(t *testing.T) {
	s, o, key := newScorer(t), newOrders(3), ordersKey(200, 1)
	var sm Sample
	for i := range 400 {
		learn(s, &sm, key, o.next(i), "one")
	}
	for _, c := range []struct {
		query, parameter string
		part             Part
	}{
		{"qty=3&color=red&note=no+hurry&secret=1", "", PartParameters},
		{"qty=3;cat&color=red&note=no+hurry", "qty", PartCharacters},
		{"qty=3&color=red&note=" + strings.Repeat("call+me+", 60), "note", PartLength},
		{"qty=3&color=violet&note=no+hurry", "color", PartValue},
	} {
		sc := score(s, &sm, key, request("GET", "/v1/orders/123456", c.query, 500))
		found := false
		for _, got := range sc.Components {
			found = found || got.Part == c.part && got.Parameter == c.parameter
			if got.Observed < got.Expected && got.P < 0.01 {
				t.Errorf("%s: %s observed %.1f, expected %.1f, p %.3f", c.query, got.Part, got.Observed, got.Expected, got.P)
			}
			if text := got.Explain(sc.N); strings.Contains(text, "cat") || strings.Contains(text, "violet") || strings.Contains(text, "secret") {
				t.Errorf("an explanation shows a value: %s", text)
			}
		}
		if !found {
			t.Errorf("%s: no component %s of %q in %v", c.query, c.part, c.parameter, sc.Components)
		}
	}
}

// TestBodies scores forms and JSON documents.
func TestBodies(t *testing.T) {
	s := newScorer(t)
	var sm Sample
	post := func(kind, body string, i int) *flow.Request {
		r := request("POST", "/v1/pay", "", i)
		r.Headers = []flow.Header{{Name: []byte("Content-Type"), Value: []byte(kind)}}
		r.Body, r.ContentLength = []byte(body), int64(len(body))
		return r
	}
	for _, c := range []struct {
		api, kind, normal string
		bad               []string
	}{
		{"form", "application/x-www-form-urlencoded; charset=utf-8", "amount=%d&to=acc%d", []string{
			"amount=5&to=acc1'--", "amount=5", "amount=5&to=acc9&cc=1", "amount=<b>&to=acc9"}},
		{"json", "application/json", `{"amount": %d, "to": {"account": "acc%d", "tags": ["a", "b"]}}`, []string{
			`{"amount": 5, "to": {"account": "acc1' OR 1=1", "tags": ["a", "b"]}}`,
			`{"amount": "5", "to": {"account": "acc1", "tags": ["a", "b"]}}`,
			`{"amount": 5, "to": {"account": "acc1", "tags": ["a", "b"], "admin": true}}`,
			`{"amount": 5, "to": {"account": "acc1", "tags": ["a", "<script>"]}}`,
			`{"amount": 5, "to": {"account": "acc1", "tags": ["a", "b"]}`,
			`{"amount": 5, "to": "\u0027 or 1=1"}`}},
	} {
		key := Key{API: c.api, Method: "POST", Template: "/v1/pay", Warmup: Warmup{Requests: 200, Identities: 1}}
		r := rand.New(rand.NewPCG(1, 2))
		normal := func(i int) *flow.Request {
			return post(c.kind, fmt.Sprintf(c.normal, 1+r.IntN(500), 1000+r.IntN(9000)), i)
		}
		for i := range 300 {
			learn(s, &sm, key, normal(i), "one")
		}
		for _, body := range c.bad {
			if sc := score(s, &sm, key, post(c.kind, body, 301)); sc.P > 0.02 || !sc.Warm {
				t.Errorf("%s: P %.3f warm %v", body, sc.P, sc.Warm)
			}
		}
		if sc := score(s, &sm, key, post("text/plain", "hello", 302)); sc.P > 0.02 {
			t.Errorf("%s: another kind of body has P %.3f", c.api, sc.P)
		}
		if sc := score(s, &sm, key, normal(303)); sc.P < 0.02 {
			t.Errorf("%s: a normal body has P %.3f: %v", c.api, sc.P, sc.Components)
		}
	}
}

// TestWildcard unfolds "/**" into endpoints, folds numbers, and finds a path
// that was never seen.
func TestWildcard(t *testing.T) {
	s := newScorer(t)
	var sm Sample
	key := Key{API: "shop/all", Method: "GET", Template: "/**", Warmup: Warmup{Requests: 200, Identities: 1}}
	r := rand.New(rand.NewPCG(5, 5))
	for i := range 600 {
		path := []string{"/a", fmt.Sprintf("/items/%d/view", r.IntN(1e6)), fmt.Sprintf("/blob/%08x-0b", r.Uint32()|0x1000000)}[i%3]
		learn(s, &sm, key, request("GET", path, "", i), "one")
	}
	var names []string
	for _, i := range s.List() {
		names = append(names, i.Template)
	}
	if got := strings.Join(names, " "); got != "/a /blob/{id} /items/{n}/view" {
		t.Errorf("endpoints %s", got)
	}
	sc := score(s, &sm, key, request("GET", "/admin.bak", "", 601))
	if !sc.Warm || sc.P > 0.01 || sc.Components[0].Part != PartEndpoint {
		t.Errorf("a path never seen: %+v", sc)
	}
	for i := range 20 {
		s.Read(&sm, key, request("GET", fmt.Sprintf("/scan-%c", 'a'+i), "", 610+i))
		s.Score(&sm)
		s.Learn(&sm, "scanner")
	}
	if n := len(s.List()); n != 3 {
		t.Errorf("a scan grew the baselines to %d endpoints", n)
	}
}

// TestQuorum quarantines a novelty and learns it from enough identities only.
func TestQuorum(t *testing.T) {
	novel := func(i int) *flow.Request {
		return request("GET", fmt.Sprint("/v1/orders/", 100000+i), "qty=3&color=red&note=no+hurry&express=1", i)
	}
	for _, c := range []struct {
		name    string
		who     int
		learned bool
	}{{"one identity", 1, false}, {"two", 2, false}, {"a quorum", 3, true}} {
		t.Run(c.name, func(t *testing.T) {
			s, o, key := newScorer(t), newOrders(11), ordersKey(200, 3)
			var sm Sample
			for i := range 600 {
				learn(s, &sm, key, o.next(i), fmt.Sprint("id", i%5))
			}
			first := score(s, &sm, key, novel(1000))
			for i := range 120 {
				learn(s, &sm, key, novel(1000+i), fmt.Sprint("id", i%c.who))
				for j := range 3 { // beside normal traffic
					learn(s, &sm, key, o.next(1000+i), fmt.Sprint("id", (i+j)%5))
				}
			}
			last := score(s, &sm, key, novel(3000))
			if first.P > 0.01 {
				t.Fatalf("a novelty has P %.3f", first.P)
			}
			if learned := last.P > 0.05; learned != c.learned {
				t.Errorf("P went from %.4f to %.4f: learned %v, want %v", first.P, last.P, learned, c.learned)
			}
		})
	}
}

// TestPoison mixes one percent of an attack into the warm-up and lets one
// identity try to teach another afterwards: both stay about that percent.
func TestPoison(t *testing.T) {
	s, o, key := newScorer(t), newOrders(13), ordersKey(1000, 3)
	var sm Sample
	attack := func(i int) *flow.Request {
		return request("GET", "/v1/orders/123456", fmt.Sprintf("qty=1'+OR+'%d'%%3D'%d&color=red&note=no+hurry", i%7, i%7), i)
	}
	for i := range 3000 {
		r := o.next(i)
		if i%100 == 50 {
			r = attack(i)
		}
		learn(s, &sm, key, r, fmt.Sprint("id", i%7))
	}
	if sc := score(s, &sm, key, attack(1)); sc.P > 0.02 {
		t.Errorf("after 1 %% poison of the attack itself its P is %.4f", sc.P)
	}
	other := request("GET", "/v1/orders/123456", "qty=3&color=red&note=<script>alert(1)</script>", 1)
	before := score(s, &sm, key, other)
	for i := range 2000 {
		learn(s, &sm, key, request("GET", "/v1/orders/123456", "qty=3&color=red&note=<script>alert(1)</script>", 4000+i), "mallory")
	}
	after := score(s, &sm, key, other)
	if before.P > 0.01 || after.P > 0.02 {
		t.Errorf("one identity taught the attack: P %.4f, then %.4f", before.P, after.P)
	}
	if sc := score(s, &sm, key, o.next(9000)); sc.P < 0.01 {
		t.Errorf("a normal request has P %.4f after the flood", sc.P)
	}
}

// TestShare caps what one identity adds to a window.
func TestShare(t *testing.T) {
	s, o, key := newScorer(t), newOrders(17), ordersKey(500, 2)
	var sm Sample
	for i := range 2000 {
		r := o.next(0)
		learn(s, &sm, key, r, "loud")
		_ = i
	}
	if n := s.List()[0].Requests; n != 250 {
		t.Errorf("one identity filled %d of a window of 500, want half", n)
	}
	hour := o.next(0)
	hour.Time = start.Add(windowSeconds * time.Second)
	learn(s, &sm, key, hour, "loud")
	if n := s.List()[0].Requests; n != 251 {
		t.Errorf("the next window did not open: %d", n)
	}
}

// TestDrift changes what is normal; after a while it is learned and P is
// spread again.
func TestDrift(t *testing.T) {
	s, o, key := newScorer(t), newOrders(19), ordersKey(200, 3)
	var sm Sample
	for i := range 600 {
		learn(s, &sm, key, o.next(i), fmt.Sprint("id", i%5))
	}
	low := 0
	for i := range 1200 {
		r := o.next(600 + i)
		r.Query = strings.Replace(r.Query, "qty=", "lang=en&qty=", 1)
		if sc := learn(s, &sm, key, r, fmt.Sprint("id", i%5)); i >= 600 && sc.P < 0.02 {
			low++
		}
	}
	if low > 30 {
		t.Errorf("%d of the last 600 requests of the new normal have P < 0.02", low)
	}
}

func TestReset(t *testing.T) {
	s := newScorer(t)
	var sm Sample
	for i := range 50 {
		learn(s, &sm, ordersKey(10, 1), newOrders(1).next(i), "one")
		learn(s, &sm, Key{API: "other", Method: "GET", Template: "/**"}, request("GET", "/x", "", i), "one")
	}
	if i, ok := s.Show("shop/orders", "GET", "/v1/orders/{id}"); !ok || i.Requests != 50 || i.Identities != 1 {
		t.Errorf("show: %+v %v", i, ok)
	}
	if n := s.Reset("shop/orders", "", ""); n != 1 || len(s.List()) != 1 {
		t.Errorf("reset dropped %d, left %v", n, s.List())
	}
	if n := s.Reset("other", "GET", "/x"); n != 1 || len(s.List()) != 0 {
		t.Errorf("reset dropped %d, left %v", n, s.List())
	}
	if sc := score(s, &sm, ordersKey(10, 1), newOrders(1).next(0)); sc.Warm {
		t.Error("warm after a reset")
	}
}

// TestBounds holds the state of an endpoint and their number to their bounds
// against senders who try.
func TestBounds(t *testing.T) {
	full := unsafe.Sizeof(endpoint{}) + maxParameters*(unsafe.Sizeof(parameter{})+maxLabel)
	if full > 8<<10 {
		t.Errorf("an endpoint takes %d bytes, at most 8 KiB", full)
	}
	s := newScorer(t)
	var sm Sample
	for i := range maxPerSpace + 200 {
		learn(s, &sm, Key{API: "w", Method: "GET", Template: "/**"}, request("GET", fmt.Sprintf("/p%c%c%c", 'a'+i%26, 'a'+i/26%26, 'a'+i/676), "", i), "one")
	}
	if n := len(s.List()); n != maxPerSpace {
		t.Errorf("%d endpoints below one wildcard, at most %d", n, maxPerSpace)
	}
	many := strings.Repeat("a=1&", 300)
	for i := range 300 {
		many += fmt.Sprintf("p%d=%d&", i, i)
	}
	learn(s, &sm, ordersKey(10, 1), request("GET", "/v1/orders/1", many, 0), "one")
	if sm.n > maxFeatures {
		t.Errorf("%d parameters", sm.n)
	}
	for i := range maxEndpoints + 100 {
		learn(s, &sm, Key{API: fmt.Sprint("api", i), Method: "GET", Template: "/x"}, request("GET", "/x", "", i), "one")
	}
	if n := len(s.List()); n != maxEndpoints || s.Full() == 0 {
		t.Errorf("%d endpoints, at most %d; counted %d", n, maxEndpoints, s.Full())
	}
}

// TestConcurrent scores and learns from many goroutines; the race detector
// judges.
func TestConcurrent(t *testing.T) {
	s, err := New(Options{StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			o := newOrders(uint64(g))
			var sm Sample
			for i := range 300 {
				learn(s, &sm, ordersKey(100, 1), o.next(i), fmt.Sprint("id", g))
				learn(s, &sm, Key{API: "w", Method: "GET", Template: "/**"}, request("GET", fmt.Sprintf("/p%c", 'a'+i%26), "", i), "one")
				if i%100 == 0 {
					s.List()
					if err := s.Save(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	if i, ok := s.Show("shop/orders", "GET", "/v1/orders/{id}"); !ok || i.Requests != 2400 {
		t.Errorf("learned %d of 2400", i.Requests)
	}
}

func TestAllocations(t *testing.T) {
	s, o, key := newScorer(t), newOrders(23), ordersKey(200, 1)
	var sm Sample
	for i := range 400 {
		learn(s, &sm, key, o.next(i), "one")
	}
	r := o.next(500)
	if n := testing.AllocsPerRun(100, func() { learn(s, &sm, key, r, "one") }); n != 0 {
		t.Errorf("%v allocations a request", n)
	}
}

func BenchmarkScore(b *testing.B) {
	for _, c := range []struct {
		name, query string
	}{
		{"3params", "qty=30&color=red&note=leave+at+the+door"},
		{"13params", "modo=registro&login=choong&password=d1se3cion&nombre=nurit&apellidos=ferrandez+cabanas&email=tarpey@bwds.ne&dni=17621392b&direccion=calle+clavel+30+11&ciudad=tronchon&cp=17463&provincia=caceres&ntc=1527409541807001&b1=registrar"},
	} {
		s := newScorer(b)
		var sm Sample
		key := ordersKey(100, 1)
		r := request("GET", "/v1/orders/123456", c.query, 1)
		for range 200 {
			learn(s, &sm, key, r, "one")
		}
		b.Run(c.name+"/read+score", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				score(s, &sm, key, r)
			}
		})
		b.Run(c.name+"/read+score+learn", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				learn(s, &sm, key, r, "one")
			}
		})
	}
}

// TestExtremes scores, and learns in quarantine, the most surprising value
// there is against a long baseline: every number stays finite.
func TestExtremes(t *testing.T) {
	s, err := New(Options{StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	var sm Sample
	key := ordersKey(100, 1)
	normal := request("GET", "/v1/orders/123456", "qty=1", 0)
	for range 3 * ageAt {
		learn(s, &sm, key, normal, "one")
	}
	all := ""
	for range 2 {
		for c := range 256 {
			all += fmt.Sprintf("%%%02x", c)
		}
	}
	worst := request("GET", "/v1/orders/"+strings.Repeat("%27", 50000), "qty="+all+strings.Repeat("&"+all+"="+all, 80), 0)
	for range 40 {
		sc := learn(s, &sm, key, worst, "one")
		if !(sc.P > 0 && sc.P < 0.001) || !(sc.Evidence > 50 && sc.Evidence < 1e5) {
			t.Fatalf("score %+v", sc)
		}
	}
	if sc := score(s, &sm, key, normal); sc.P < 0.5 {
		t.Errorf("the normal request afterwards: %+v", sc)
	}
	if err := s.Save(); err != nil {
		t.Fatal(err)
	}
	if s, err = New(Options{StateDir: s.opt.StateDir}); err != nil || len(s.List()) != 1 {
		t.Errorf("load: %v", err)
	}
}

// TestPlainTraffic learns the little variety that a script sends: still an
// injection stands out and the next of its kind does not.
func TestPlainTraffic(t *testing.T) {
	for _, c := range []struct {
		name string
		next func(i int) string
	}{
		{"always the same", func(int) string { return "id=5" }},
		{"counting", func(i int) string { return fmt.Sprint("id=", i+1) }},
		{"counting from far", func(i int) string { return fmt.Sprint("id=", i+5000) }},
		{"one of ten", func(i int) string { return fmt.Sprint("id=", i%10) }},
		{"a word", func(i int) string { return "name=" + []string{"anna", "bert", "carla", "dieter", "eva"}[i%5] }},
	} {
		for _, n := range []int{60, 120, 200} {
			t.Run(fmt.Sprint(c.name, "/", n), func(t *testing.T) {
				s := newScorer(t)
				var sm Sample
				key := Key{API: "demo", Method: "GET", Template: "/v1/items", Warmup: Warmup{Requests: n, Identities: 1}}
				for i := range n {
					learn(s, &sm, key, request("GET", "/v1/items", c.next(i), i), "one")
				}
				for _, attack := range []string{"' OR '1'='1", "%27%20OR%20%271%27%3D%271", "<script>alert(1)</script>", "../../etc/passwd", "1;rm -rf /"} {
					q := c.next(0) + attack
					if sc := score(s, &sm, key, request("GET", "/v1/items", q, n)); !sc.Warm || sc.P > 0.02 {
						t.Errorf("%s: P %.4f, N %d, warm %v", q, sc.P, sc.N, sc.Warm)
					}
				}
				if sc := score(s, &sm, key, request("GET", "/v1/items", c.next(0)+"&debug=1", n)); sc.P > 0.02 {
					t.Errorf("a new parameter: P %.4f", sc.P)
				}
				for i := range 20 {
					q := c.next(n + i)
					if sc := learn(s, &sm, key, request("GET", "/v1/items", q, n+i), "one"); sc.P <= 0.02 {
						t.Errorf("%s: P %.4f of a normal request: %v", q, sc.P, sc.Components)
					}
				}
			})
		}
	}
}
