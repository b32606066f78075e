// SPDX-License-Identifier: Apache-2.0

package token

import (
	"strings"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// FromRequest returns the access token of a request (RFC 6750 section 2.1, RFC
// 9449 section 7.1), aliasing the request's buffer, and whether it came with the
// scheme DPoP. It refuses with flow.ReasonTokenPlace two Authorization fields or
// a token in the query, with ReasonTokenMissing a request without a token, and
// with ReasonTokenMalformed what is not one b64token.
func FromRequest(r *flow.Request) (raw []byte, dpop bool, reason flow.Reason) {
	value, count := r.HeaderValue("Authorization")
	if count > 1 || inQuery(r.Query) {
		return nil, false, flow.ReasonTokenPlace
	}
	if count == 0 {
		return nil, false, flow.ReasonTokenMissing
	}
	const scheme = "bearer"
	end := 0
	for end < len(value) && value[end] != ' ' && value[end] != '\t' {
		end++
	}
	dpop = equalFold(value[:end], "dpop")
	if !dpop && !equalFold(value[:end], scheme) {
		return nil, false, flow.ReasonTokenMissing
	}
	for end < len(value) && value[end] == ' ' {
		end++
	}
	raw = value[end:]
	if len(raw) == 0 {
		return nil, dpop, flow.ReasonTokenMissing
	}
	if len(raw) > MaxToken {
		return nil, dpop, flow.ReasonTokenTooLarge
	}
	if !WellFormed(raw) {
		return nil, dpop, flow.ReasonTokenMalformed
	}
	return raw, dpop, flow.ReasonOK
}

// WellFormed says whether raw has only bytes that a bearer token may have (RFC
// 6750 section 2.1), and is no larger than one may be.
func WellFormed(raw []byte) bool {
	for _, c := range raw {
		if !base64urlByte[c] && c != '.' && c != '~' && c != '+' && c != '/' && c != '=' {
			return false
		}
	}
	return len(raw) > 0 && len(raw) <= MaxToken
}

func equalFold(b []byte, lower string) bool {
	if len(b) != len(lower) {
		return false
	}
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c != lower[i] {
			return false
		}
	}
	return true
}

// inQuery says whether a query holds a parameter access_token (RFC 6750
// section 2.3), however its name is escaped and whichever separator a server
// might split at.
func inQuery(query string) bool {
	for query != "" {
		part := query
		if at := strings.IndexAny(query, "&;"); at >= 0 {
			part, query = query[:at], query[at+1:]
		} else {
			query = ""
		}
		if name, _, _ := strings.Cut(part, "="); isAccessToken(name) {
			return true
		}
	}
	return false
}

// isAccessToken compares a percent-encoded name with access_token, ASCII
// case ignored.
func isAccessToken(name string) bool {
	const want = "access_token"
	n := 0
	for i := 0; i < len(name); i++ {
		c := name[i]
		if c == '%' && i+2 < len(name) {
			high, low := unhex(name[i+1]), unhex(name[i+2])
			if high < 16 && low < 16 {
				c = high<<4 | low
				i += 2
			}
		}
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		if n == len(want) || c != want[n] {
			return false
		}
		n++
	}
	return n == len(want)
}

func unhex(c byte) byte {
	switch {
	case '0' <= c && c <= '9':
		return c - '0'
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10
	}
	return 16
}
