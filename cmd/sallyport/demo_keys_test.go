package main

import (
	"bytes"
	"strings"
	"testing"
)

// aStage has these keys pressed, and then its input ended.
func aStage(keys string) (*stage, *bytes.Buffer) {
	var out bytes.Buffer
	s := &stage{p: &decisionPrinter{d: &demo{out: &out}}, keys: make(chan byte, len(keys))}
	for _, k := range []byte(keys) {
		s.keys <- k
	}
	close(s.keys)
	return s, &out
}

func TestGuide(t *testing.T) {
	all := strings.Repeat("s", len(deeds()))
	for name, c := range map[string]struct{ keys, says, err string }{
		"every step left out": {all, "that was the tour: 7 steps, 0 not seen", ""},
		"left early":          {"ssq", "step 3 of 7, fault", ""},
		"input that ends":     {"ss", "step 3 of 7, fault", "its input has ended"},
	} {
		s, out := aStage(c.keys)
		err := s.guide(t.Context())
		if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) || !strings.Contains(out.String(), c.says) {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

func TestKeys(t *testing.T) {
	taken := map[byte]bool{'q': true, 't': true, 'w': true, '?': true, 'h': true, 's': true, ' ': true}
	for _, x := range deeds() {
		if taken[x.key] {
			t.Errorf("%s: the key %c means something else, too", x.name, x.key)
		}
		taken[x.key] = true
		if x.happens == "" || x.look == "" || strings.Contains(x.happens+x.look, "\n") {
			t.Errorf("%s: what happens and where to look are a line each", x.name)
		}
	}
	s, out := aStage("?xq")
	if err := s.obey(t.Context()); err != nil || !strings.Contains(out.String(), "k  kill") {
		t.Errorf("%v\n%s", err, out)
	}
}
