// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"fmt"
	"net/http"
	"strings"
)

// parseMethod reads "PACKAGE.SERVICE/METHOD" or "PACKAGE.SERVICE/*", the
// names of protocol buffers. What is called is POST /PACKAGE.SERVICE/METHOD
// (gRPC over HTTP/2); * stands for any one method. An allow rule's is met by
// calls of gRPC alone, a deny rule's by whatever goes to that path.
func parseMethod(s string) (*pattern, error) {
	if len(s) > maxPatternBytes {
		return nil, fmt.Errorf("a pattern may have %d bytes, this one has %d", maxPatternBytes, len(s))
	}
	service, method, ok := strings.Cut(s, "/")
	if ok && isService(service) && (method == "*" || isName(method)) {
		p := &pattern{method: http.MethodPost, template: s, grpc: true, segments: []segment{{literal: service}, {literal: method}}}
		if method == "*" {
			p.segments[1] = segment{param: true}
		}
		return p, nil
	}
	hint := ""
	if m := nearMethod(s); m != "" {
		hint = fmt.Sprintf(" (did you mean %q?)", m)
	}
	return nil, fmt.Errorf("%q is not PACKAGE.SERVICE/METHOD or PACKAGE.SERVICE/*%s", s, hint)
}

// nearMethod guesses what a text that is no method was to be, "" for nothing.
func nearMethod(s string) string {
	s = strings.TrimPrefix(strings.TrimPrefix(s, http.MethodPost+" "), "/")
	if isService(s) {
		return s + "/*"
	}
	service, method, _ := strings.Cut(strings.TrimSuffix(s, "/"), "/")
	switch {
	case !isService(service):
		return ""
	case method == "" || method == "**":
		return service + "/*"
	case isName(method) || method == "*":
		return service + "/" + method
	}
	return ""
}

func isService(s string) bool {
	for name := range strings.SplitSeq(s, ".") {
		if !isName(name) {
			return false
		}
	}
	return true
}

// isName says whether s is an identifier of protocol buffers.
func isName(s string) bool {
	if s == "" || '0' <= s[0] && s[0] <= '9' {
		return false
	}
	for i := range len(s) {
		if !isAlnum(s[i]) && s[i] != '_' {
			return false
		}
	}
	return true
}
