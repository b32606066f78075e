// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
)

// Facts are what is known of a caller's node and program. One that is not
// known is left zero.
type Facts struct {
	Quote      Fact[bool]  // a TPM quote, and whether it was good; measured when it was made
	SecureBoot Fact[bool]  // whether it is on
	Lockdown   Fact[uint8] // compile.LockdownNone and above
	Digest     Fact[uint8] // compile.DigestUnlisted and above
	Exec       Fact[bool]  // whether another program ran after the connection was opened
	Privileged Fact[bool]  // whether it is a privileged container, or in the host's PID namespace
	// Provenance is who built it, by statements that were verified; empty
	// where there is none.
	Provenance      Fact[[]Build]
	SBOM            Fact[Bill]
	Vulnerabilities Fact[[]Vulnerability]
	Risk            Fact[uint8] // compile.LevelLow and above
}

// Fact is a value with where it comes from and how long it holds.
type Fact[T any] struct {
	Value    T
	Source   string // "" for a fact that is not known
	Measured time.Time
	TTL      time.Duration
	Attested bool // signed by the authority, not by the node alone
}

// Build is one verified statement of who built a program.
type Build struct{ Builder, Issuer string }

// Bill is a program's bill of materials.
type Bill struct {
	Present bool
	Made    time.Time
}

// Vulnerability is a known one of a program.
type Vulnerability struct {
	Severity    uint8 // compile.LevelLow and above
	Loaded      bool  // in what is loaded, or where it is not known what is
	NotAffected bool  // a VEX statement that is trusted says so
	Published   time.Time
}

// ahead is how far the clock that measured may be ahead of ours.
const ahead = time.Minute

// known says whether a fact holds now and is proven as is asked for. What is
// stale is not known.
func (f *Fact[T]) known(now time.Time, attested bool) bool {
	return f.Source != "" && !f.Measured.IsZero() && !f.Measured.After(now.Add(ahead)) && now.Before(f.end()) && (f.Attested || !attested)
}

func (f *Fact[T]) end() time.Time { return f.Measured.Add(f.TTL) }

// standing is how a requirement stands.
type standing uint8

const (
	unknown  standing = iota
	fails             // known, and does not suffice
	warns             // does not suffice, and the profile only asks to say so
	suffices          // until the time that comes with it
)

func verdict(ok bool) standing {
	if ok {
		return suffices
	}
	return fails
}

// hold holds a requirement against the facts. until is when the answer may
// be another though no fact changes.
func (f *Facts) hold(q *compile.Requirement, attested bool, now time.Time) (s standing, until time.Time) {
	if f == nil {
		return unknown, time.Time{}
	}
	switch q.Fact {
	case compile.FactQuote:
		return judge(&f.Quote, attested, now, func(good bool) (standing, time.Time) {
			end := f.Quote.Measured.Add(q.MaxAge)
			return verdict(good && now.Before(end)), end
		})
	case compile.FactSecureBoot:
		return judge(&f.SecureBoot, attested, now, func(on bool) (standing, time.Time) { return verdict(on), time.Time{} })
	case compile.FactLockdown:
		return judge(&f.Lockdown, attested, now, func(l uint8) (standing, time.Time) { return verdict(l >= q.Level), time.Time{} })
	case compile.FactDigest:
		return judge(&f.Digest, attested, now, func(l uint8) (standing, time.Time) { return verdict(l >= q.Level), time.Time{} })
	case compile.FactExec:
		return judge(&f.Exec, attested, now, func(ran bool) (standing, time.Time) { return verdict(!ran), time.Time{} })
	case compile.FactPrivileged:
		return judge(&f.Privileged, attested, now, func(is bool) (standing, time.Time) { return verdict(!is), time.Time{} })
	case compile.FactProvenance:
		return judge(&f.Provenance, attested, now, func(all []Build) (standing, time.Time) { return builtBy(q, all), time.Time{} })
	case compile.FactSBOM:
		return judge(&f.SBOM, attested, now, func(b Bill) (standing, time.Time) { return billed(q, b, now) })
	case compile.FactVulnerabilities:
		return judge(&f.Vulnerabilities, attested, now, func(all []Vulnerability) (standing, time.Time) { return vulnerable(q, all, now) })
	case compile.FactRisk:
		return judge(&f.Risk, attested, now, func(l uint8) (standing, time.Time) { return verdict(l <= q.Level), time.Time{} })
	}
	return unknown, time.Time{}
}

// judge asks test where the fact is known, and ends its answer with the fact.
func judge[T any](f *Fact[T], attested bool, now time.Time, test func(T) (standing, time.Time)) (standing, time.Time) {
	if !f.known(now, attested) {
		return unknown, time.Time{}
	}
	s, until := test(f.Value)
	if until.IsZero() || f.end().Before(until) {
		until = f.end()
	}
	return s, until
}

func builtBy(q *compile.Requirement, all []Build) standing {
	for _, b := range all {
		if b.Issuer == q.Issuer && (b.Builder == q.Builder || q.AnyRest && strings.HasPrefix(b.Builder, q.Builder)) {
			return suffices
		}
	}
	if len(all) == 0 && q.Warn {
		return warns
	}
	return fails
}

func billed(q *compile.Requirement, b Bill, now time.Time) (standing, time.Time) {
	if !b.Present || q.MaxAge == 0 {
		return verdict(b.Present), time.Time{}
	}
	end := b.Made.Add(q.MaxAge)
	return verdict(now.Before(end)), end
}

// vulnerable counts those from the severity on. until is when the first
// grace ends.
func vulnerable(q *compile.Requirement, all []Vulnerability, now time.Time) (s standing, until time.Time) {
	for i := range all {
		v := &all[i]
		if v.Severity < q.Level || q.Loaded && !v.Loaded || v.NotAffected && !q.IgnoreVEX {
			continue
		}
		if end := v.Published.Add(q.Grace); now.Before(end) && !v.Published.After(now.Add(ahead)) {
			if until.IsZero() || end.Before(until) {
				until = end
			}
			continue
		}
		if q.Warn {
			return warns, time.Time{}
		}
		return fails, time.Time{}
	}
	return suffices, until
}
