package http1

import (
	"bytes"
	"strings"
	"testing"
)

const hidden = "sk_live_0123456789"

// scrubAll passes pieces through a Scrub.
func scrubAll(text string, pieces ...[]byte) string {
	s := NewScrub(text)
	var out bytes.Buffer
	for _, p := range pieces {
		out.Write(s.feed(p))
	}
	out.Write(s.rest())
	return out.String()
}

func TestScrubFindsTheTextHoweverItIsCut(t *testing.T) {
	stars := strings.Repeat("*", len(hidden))
	for body, want := range map[string]string{
		"":                                   "",
		"nothing of it":                      "nothing of it",
		hidden:                               stars,
		"a" + hidden + "b" + hidden + hidden: "a" + stars + "b" + stars + stars,
		"sk_live_sk_live_0123456789":         "sk_live_" + stars,
		"its beginning: sk_live_":            "its beginning: sk_live_",
	} {
		for size := 1; size <= len(body)+1; size++ {
			var pieces [][]byte
			for rest := []byte(body); len(rest) > 0; rest = rest[min(size, len(rest)):] {
				pieces = append(pieces, rest[:min(size, len(rest))])
			}
			if got := scrubAll(hidden, pieces...); got != want {
				t.Errorf("%q in pieces of %d: %q", body, size, got)
			}
		}
	}
}

// FuzzScrub holds it against what a search in the whole text finds.
func FuzzScrub(f *testing.F) {
	f.Add("abab", []byte("xabababx"), 3)
	f.Add(hidden, []byte("a"+hidden), 1)
	f.Fuzz(func(t *testing.T, text string, body []byte, cut int) {
		if text == "" || strings.Contains(text, "*") || cut < 0 {
			return
		}
		cut = min(cut, len(body))
		got := scrubAll(text, body[:cut], body[cut:])
		if len(got) != len(body) || strings.Contains(got, text) {
			t.Errorf("%q is left in %q", text, got)
		}
	})
}
