// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/sallyport-dev/sallyport/policies/load"
)

// reader fills a Config and collects what is wrong, each with its place.
type reader struct {
	config   *Config
	problems []load.Problem
	from     map[string]load.Position // where each value that was set comes from
}

func (r *reader) problem(p load.Position, severity load.Severity, format string, args ...any) {
	r.problems = append(r.problems, load.Problem{Position: p, Severity: severity, Message: fmt.Sprintf(format, args...)})
}

var yamlLine = regexp.MustCompile(`^(?:yaml: )?(?:line (\d+): )?(?s:(.*))$`)

// file reads the YAML of the file: one mapping, known keys, each once.
func (r *reader) file(name string, content []byte) {
	at := load.Position{File: name}
	if len(content) > maxFile {
		r.problem(at, load.Error, "more than %d bytes", maxFile)
		return
	}
	var doc, more yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(content))
	err := dec.Decode(&doc)
	if errors.Is(err, io.EOF) {
		return
	}
	if err == nil {
		if err = dec.Decode(&more); errors.Is(err, io.EOF) {
			err = nil
		} else if err == nil {
			r.problem(position(name, &more), load.Error, "one document is all that is read")
			return
		}
	}
	if err != nil {
		m := yamlLine.FindStringSubmatch(err.Error())
		at.Line, _ = strconv.Atoi(m[1])
		r.problem(at, load.Error, "%s", m[2])
		return
	}
	r.mapping(name, "", doc.Content[0])
}

// mapping reads the keys beneath prefix.
func (r *reader) mapping(name, prefix string, n *yaml.Node) {
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return
	}
	if n.Kind != yaml.MappingNode {
		what := "the file"
		if prefix != "" {
			what = strings.TrimSuffix(prefix, ".")
		}
		r.problem(position(name, n), load.Error, "%s: keys and values are needed", what)
		return
	}
	first := map[string]*yaml.Node{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		if k.Kind != yaml.ScalarNode {
			r.problem(position(name, k), load.Error, "a key must be a plain word")
			continue
		}
		if before := first[k.Value]; before != nil {
			r.problem(position(name, k), load.Error, "%q is set twice; first at %s", prefix+k.Value, position(name, before))
			continue
		}
		first[k.Value] = k
		r.value(name, prefix+k.Value, k, v)
	}
}

func (r *reader) value(name, key string, k, v *yaml.Node) {
	at := position(name, v)
	if s := settingOf(key); s != nil {
		r.from[key] = at
		if s.list {
			items, ok := r.items(name, s, v)
			if ok {
				r.report(at, key, s.setList(r.config, items))
			}
			return
		}
		if v.Kind != yaml.ScalarNode {
			r.problem(at, load.Error, "%s: one value is needed", key)
			return
		}
		if v.Style == 0 && slices.Contains([]string{"yes", "no", "on", "off"}, strings.ToLower(v.Value)) {
			r.problem(at, load.Error, "%s: %s is read differently by different YAML readers: quote it", key, v.Value)
			return
		}
		text := v.Value
		if v.Tag == "!!null" {
			text = ""
		}
		r.report(at, key, s.set(r.config, text))
		return
	}
	prefix := key + "."
	if slices.ContainsFunc(settings, func(s setting) bool { return strings.HasPrefix(s.key, prefix) }) {
		r.mapping(name, prefix, v)
		return
	}
	r.problem(position(name, k), load.Error, "unknown key %q%s", key, load.DidYouMean(key, keys(), `"`))
}

func (r *reader) items(name string, s *setting, v *yaml.Node) ([]string, bool) {
	if v.Kind != yaml.SequenceNode {
		r.problem(position(name, v), load.Error, "%s: a list is needed: [...]", s.key)
		return nil, false
	}
	items := make([]string, 0, len(v.Content))
	for _, n := range v.Content {
		if n.Kind != yaml.ScalarNode {
			r.problem(position(name, n), load.Error, "%s: one value is needed", s.key)
			return nil, false
		}
		items = append(items, n.Value)
	}
	return items, true
}

// keys lists what a mistyped key can have meant: values and groups.
func keys() []string {
	var all []string
	for _, s := range settings {
		all = append(all, s.key)
		for i := strings.LastIndexByte(s.key, '.'); i > 0; i = strings.LastIndexByte(s.key[:i], '.') {
			all = append(all, s.key[:i])
		}
	}
	return all
}

// env reads the variables that begin with SALLYPORT_. An unknown one is a
// warning only: the environment is shared with what starts the agent.
func (r *reader) env(env []string) {
	byName := map[string]*setting{}
	var names []string
	for i := range settings {
		byName[settings[i].env()] = &settings[i]
		names = append(names, settings[i].env())
	}
	for _, e := range env {
		name, text, _ := strings.Cut(e, "=")
		if !strings.HasPrefix(name, "SALLYPORT_") {
			continue
		}
		at := load.Position{File: "$" + name}
		s := byName[name]
		if s == nil {
			r.problem(at, load.Warning, "no setting has that variable%s", load.DidYouMean(name, names, ""))
			continue
		}
		r.text(at, s, text)
	}
}

func (r *reader) flags(given map[string]string) {
	for i := range settings {
		s := &settings[i]
		text, ok := given[s.key]
		if !ok {
			continue
		}
		at := load.Position{File: "--" + s.flag()}
		if s.key == "identity.authority.token" && text != "" && !filepath.IsAbs(text) {
			r.problem(at, load.Error, "name a file: everybody on this machine can read a command line")
			continue
		}
		r.text(at, s, text)
	}
}

func (r *reader) text(at load.Position, s *setting, text string) {
	r.from[s.key] = at
	if !s.list {
		r.report(at, s.key, s.set(r.config, text))
		return
	}
	var items []string
	if text != "" {
		items = strings.Split(text, ",")
	}
	r.report(at, s.key, s.setList(r.config, items))
}

func (r *reader) report(at load.Position, key string, err error) {
	if err != nil {
		r.problem(at, load.Error, "%s: %s", key, err)
	}
}

// validate checks what values must be together.
func (r *reader) validate() {
	c := r.config
	if _, err := nodeName(c.Node); err != nil {
		if _, given := r.from["node"]; !given {
			r.problem(load.Position{}, load.Error, "node: the host's name %q cannot name a node; set node: in the configuration", c.Node)
		}
	}
	metrics := c.Listen.Metrics.Port()
	for _, p := range []struct {
		key  string
		a, b uint16
	}{
		{"listen.inbound", c.Listen.Inbound, c.Listen.Outbound},
		{"listen.tunnel", c.Listen.Tunnel, c.Listen.Outbound},
		{"listen.tunnel", c.Listen.Tunnel, c.Listen.Inbound},
		{"listen.metrics", metrics, c.Listen.Outbound},
		{"listen.metrics", metrics, c.Listen.Inbound},
		{"listen.metrics", metrics, c.Listen.Tunnel},
	} {
		if p.a == p.b {
			r.problem(r.from[p.key], load.Error, "%s: port %d is another listener's already", p.key, p.a)
		}
	}
	if !c.Listen.Metrics.Addr().IsLoopback() {
		r.problem(r.from["listen.metrics"], load.Warning, "listen.metrics: %s can be reached from other hosts, without any authentication", c.Listen.Metrics)
	}
	if a := c.Identity.Authority; c.Identity.Source == "authority" && a.Address == "" {
		r.problem(r.from["identity.source"], load.Error, "identity.authority.address: needed with source: authority")
	} else if c.Identity.Source == "embedded" && a.Address != "" {
		r.problem(r.from["identity.authority.address"], load.Error, "identity.authority.address: has no effect with source: embedded; write source: authority")
	}
}

func position(name string, n *yaml.Node) load.Position {
	return load.Position{File: name, Line: n.Line, Column: n.Column}
}
