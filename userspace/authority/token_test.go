// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func sampleToken() Token {
	var t Token
	for i := range t.Pin {
		t.Pin[i], t.secret[i] = byte(i), byte(255-i)
	}
	return t
}

func TestParseToken(t *testing.T) {
	want := sampleToken()
	text := want.Encode()
	if got, err := ParseToken(text); err != nil || got != want {
		t.Fatalf("%v", err)
	}
	body := text[len(tokenPrefix):]
	last := body[len(body)-1]
	for name, s := range map[string]string{
		"empty":          "",
		"prefix alone":   tokenPrefix,
		"other version":  "sjt2." + body,
		"no prefix":      body,
		"upper prefix":   "SJT1." + body,
		"short":          text[:len(text)-1],
		"long":           text + "A",
		"padded":         text + "==",
		"space":          text + " ",
		"new line":       tokenPrefix + "\n" + body[1:],
		"standard":       tokenPrefix + "+/" + body[2:],
		"spare bits set": text[:len(text)-1] + string(last+1),
		"NUL":            tokenPrefix + "\x00" + body[1:],
		"one more byte":  tokenPrefix + base64.RawURLEncoding.EncodeToString(make([]byte, tokenSize+1)),
	} {
		if _, err := ParseToken(s); err == nil {
			t.Errorf("%s: %q accepted", name, s)
		} else if len(s) > 20 && strings.Contains(err.Error(), s[5:]) {
			t.Errorf("%s: the error repeats the token", name)
		}
	}
	for _, s := range []string{fmt.Sprint(want), fmt.Sprintf("%v", want), want.String(), fmt.Sprintf("%#v", want)} {
		if strings.Contains(s, body[50:]) || !strings.Contains(s, want.ID()) {
			t.Errorf("printed as %q", s)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add(sampleToken().Encode())
	f.Add("sjt1.")
	f.Add("sjt1." + strings.Repeat("A", 86))
	f.Fuzz(func(t *testing.T, s string) {
		if token, err := ParseToken(s); err == nil && token.Encode() != s {
			t.Errorf("%q is not the one form of its content", s)
		}
	})
}

func TestLoadToken(t *testing.T) {
	want := sampleToken()
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, s := range []string{want.Encode(), write("a", want.Encode()), write("b", "\n"+want.Encode()+"\n")} {
		if got, err := LoadToken(s); err != nil || got != want {
			t.Errorf("%q: %v", s, err)
		}
	}
	for name, s := range map[string]string{
		"missing": filepath.Join(dir, "none"), "directory": dir, "device": "/dev/zero", "other": write("c", "x"),
		"large": write("d", want.Encode()+strings.Repeat("\n", maxTokenFile)), "damaged": "sjt1.x",
	} {
		if _, err := LoadToken(s); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
