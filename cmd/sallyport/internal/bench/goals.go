// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"math"
)

// goal is a ratio, or a difference, that a run is held against.
type goal struct {
	name  string
	limit float64
	least bool // the figure has to be at least the limit, else at most
	value func(r *results, round int) (float64, bool)
}

// noise is what two equal things may differ by in a run.
const noise = 0.03

var goals = []goal{
	{"one node, identity alone: requests/s of direct, c=1", 1 - noise, true, ratio(same, bareSame, mode{connections: 1}, rate)},
	{"one node, identity alone: requests/s of direct, c=64", 1 - noise, true, ratio(same, bareSame, mode{connections: 64}, rate)},
	{"one node, identity alone: ns that connect() takes longer", 300, false, connectCost},
	{"one node, method and path: added p50 of the best HTTP pair's, c=1", .5, false, added(sameHTTP, bareSame, kindPeerHTTP, 1)},
	{"one node, method and path: added p50 of the best HTTP pair's, c=64", .5, false, added(sameHTTP, bareSame, kindPeerHTTP, 64)},
	{"across, identity alone: CPU of the lowest L4 pair's, c=1", 1, false, againstPeer(acrossL4, kindPeerL4, mode{connections: 1}, cpu, lowest)},
	{"across, identity alone: CPU of the lowest L4 pair's, c=16", .6, false, againstPeer(acrossL4, kindPeerL4, mode{connections: 16}, cpu, lowest)},
	{"across, identity alone: CPU of the lowest L4 pair's, c=64", .5, false, againstPeer(acrossL4, kindPeerL4, mode{connections: 64}, cpu, lowest)},
	{"across, identity alone: CPU of the lowest L4 pair's, c=512", .4, false, againstPeer(acrossL4, kindPeerL4, mode{connections: 512}, cpu, lowest)},
	{"across, method and path: CPU of the lowest HTTP pair's, c=1", .7, false, againstPeer(acrossHTTP, kindPeerHTTP, mode{connections: 1}, cpu, lowest)},
	{"across, method and path: CPU of the lowest HTTP pair's, c=16", .45, false, againstPeer(acrossHTTP, kindPeerHTTP, mode{connections: 16}, cpu, lowest)},
	{"across, method and path: CPU of the lowest HTTP pair's, c=64", .35, false, againstPeer(acrossHTTP, kindPeerHTTP, mode{connections: 64}, cpu, lowest)},
	{"across, identity alone: requests/s of the best L4 pair's, c=64", 1.4, true, againstPeer(acrossL4, kindPeerL4, mode{connections: 64}, rate, highest)},
	{"across, method and path: requests/s of the best HTTP pair's, c=64", 2, true, againstPeer(acrossHTTP, kindPeerHTTP, mode{connections: 64}, rate, highest)},
	{"across, identity alone: p99 of the best L4 pair's, c=64", .5, false, againstPeer(acrossL4, kindPeerL4, mode{connections: 64}, p99, lowest)},
	{"across, identity alone: p99 of the best L4 pair's, c=512", .4, false, againstPeer(acrossL4, kindPeerL4, mode{connections: 512}, p99, lowest)},
	{"across, method and path: p99 of the best HTTP pair's, c=64", .5, false, againstPeer(acrossHTTP, kindPeerHTTP, mode{connections: 64}, p99, lowest)},
	{"across, identity alone: added p50 of the best L4 pair's, c=1", .9, false, added(acrossL4, bareAcross, kindPeerL4, 1)},
	{"across, method and path: added p50 of the best HTTP pair's, c=1", .9, false, added(acrossHTTP, bareAcross, kindPeerHTTP, 1)},
	{"across, identity alone: new connections/s of the best L4 pair's, 1 at a time", 2, true, againstPeer(acrossL4, kindPeerL4, mode{1, true}, rate, highest)},
	{"across, identity alone: new connections/s of the best L4 pair's, 16 at a time", 2, true, againstPeer(acrossL4, kindPeerL4, mode{16, true}, rate, highest)},
	{"across, method and path: new connections/s of the best HTTP pair's, 16 at a time", 1.3, true, againstPeer(acrossHTTP, kindPeerHTTP, mode{16, true}, rate, highest)},
	{"all stages: us of CPU a request above identity alone, c=1", 10, false, above(acrossFull, acrossL4, 1)},
	{"all stages: us of CPU a request above identity alone, c=64", 10, false, above(acrossFull, acrossL4, 64)},
	{"memory of an idle agent, MiB", 30, false, func(r *results, round int) (float64, bool) { return r.idleMiB, round == 0 }},
}

// ratio is a figure over that of another variant in the same round.
func ratio(name, to string, m mode, f figure) func(*results, int) (float64, bool) {
	return func(r *results, round int) (float64, bool) {
		x, ok := r.at(name, m, round, f)
		y, too := r.at(to, m, round, f)
		return x / y, ok && too
	}
}

// againstPeer is a figure over that of the best peer in the same round.
func againstPeer(name string, k kind, m mode, f figure, better func(...float64) float64) func(*results, int) (float64, bool) {
	return func(r *results, round int) (float64, bool) {
		x, ok := r.at(name, m, round, f)
		y, too := r.best(k, m, round, f, better)
		return x / y, ok && too
	}
}

// added is how much a variant adds to the median latency of the bare
// connection, over how much the best peer adds to its own.
func added(name, bare string, k kind, connections int) func(*results, int) (float64, bool) {
	return func(r *results, round int) (float64, bool) {
		m := mode{connections: connections}
		x, ok1 := r.at(name, m, round, p50)
		under, ok2 := r.at(bare, m, round, p50)
		y, ok3 := r.best(k, m, round, p50, lowest)
		across, ok4 := r.at(bareAcross, m, round, p50)
		return (x - under) / (y - across), ok1 && ok2 && ok3 && ok4
	}
}

// above is how much more CPU time a request takes than in another variant.
func above(name, than string, connections int) func(*results, int) (float64, bool) {
	return func(r *results, round int) (float64, bool) {
		x, ok := r.at(name, mode{connections: connections}, round, cpu)
		y, too := r.at(than, mode{connections: connections}, round, cpu)
		return x - y, ok && too
	}
}

func connectCost(r *results, round int) (float64, bool) {
	if round >= len(r.connect.bare) || round >= len(r.connect.hooked) || len(r.samples[same]) == 0 {
		return 0, false
	}
	return r.connect.hooked[round].Median - r.connect.bare[round].Median, true
}

// verdict says whether what was found meets the goal.
func (g goal) verdict(s spread) string {
	switch {
	case math.IsNaN(s.median):
		return "not measured"
	case g.least && s.median >= g.limit, !g.least && s.median <= g.limit:
		return "met"
	}
	return "missed"
}

// goals writes each goal with what the run found, and whether it is met.
func (r *results) goals(b *bytes.Buffer) {
	fmt.Fprintf(b, "### Goals\n\nMedian of the rounds' own ratios (least to most).\n\n| goal | | found | |\n|---|---|---|---|\n")
	for _, g := range goals {
		var v []float64
		for round := range r.o.rounds {
			if x, ok := g.value(r, round); ok && !math.IsNaN(x) && !math.IsInf(x, 0) {
				v = append(v, x)
			}
		}
		word := "at most"
		if g.least {
			word = "at least"
		}
		s := spreadOf(v)
		fmt.Fprintf(b, "| %s | %s %s | %s | %s |\n", g.name, word, short(g.limit), s, g.verdict(s))
	}
	bare, hooked := make([]float64, 0, r.o.rounds), make([]float64, 0, r.o.rounds)
	for i := range r.connect.bare {
		bare = append(bare, r.connect.bare[i].Median/1e3)
		hooked = append(hooked, r.connect.hooked[i].Median/1e3)
	}
	fmt.Fprintf(b, "\nconnect() on one node, us, medians: %s without hooks, %s with all of them and the verdict `direct`.\n\n", spreadOf(bare), spreadOf(hooked))
}
