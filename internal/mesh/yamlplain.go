package mesh

import (
	"fmt"

	"github.com/goccy/go-yaml/token"
)

const (
	// maxNesting bounds lists in lists and maps in maps; no document here needs
	// more than six.
	maxNesting = 32
	// maxKeys bounds the fields of one map: the parser takes time in the square
	// of their number, 75 s for 100,000.
	maxKeys = 4096
	// maxColumn bounds the length of a line, in characters.
	maxColumn = 1 << 14
)

// notData are tokens that make YAML more than data.
var notData = map[token.Type]string{
	token.AnchorType:    "anchors (&) are not supported",
	token.AliasType:     "aliases (*) are not supported: quote text that starts with *",
	token.TagType:       "tags (!) are not supported: quote text that starts with !",
	token.MergeKeyType:  "merge keys (<<) are not supported",
	token.DirectiveType: "directives (%) are not supported",
}

// plain refuses what is more than data, and documents of a shape that would
// exhaust the parser: it is recursive, and slow with many keys.
func (d *decoder) plain(tokens token.Tokens) bool {
	var s shape
	for _, t := range tokens {
		what := notData[t.Type]
		if what == "" {
			what = s.add(t)
		}
		if what != "" {
			d.at(t, "%s", what)
			return false
		}
	}
	return true
}

// A shape measures a document from its tokens.
type shape struct {
	depth int // of brackets
	// entries are the "- ", "? " and ": " on one line, each of which nests.
	line, entries int
	// keys counts the keys of the block map at each column, and flowKeys those
	// since the outermost bracket.
	keys     map[int]int
	flowKeys int
}

// add returns what is too much, if anything.
func (s *shape) add(t *token.Token) string {
	if s.keys == nil {
		s.keys = map[int]int{}
	}
	switch t.Type {
	case token.MappingStartType, token.SequenceStartType:
		if s.depth == 0 {
			s.flowKeys = 0
		}
		s.depth++
	case token.MappingEndType, token.SequenceEndType:
		s.depth--
	case token.SequenceEntryType, token.MappingKeyType, token.MappingValueType:
		s.entry(t)
	}
	switch {
	case s.depth > maxNesting || s.entries > maxNesting:
		return fmt.Sprintf("nested deeper than %d", maxNesting)
	case t.Position.Column > maxColumn:
		return fmt.Sprintf("line is longer than %d characters", maxColumn)
	case s.flowKeys > maxKeys || s.keys[keyColumn(t)] > maxKeys:
		return fmt.Sprintf("more than %d fields in one place", maxKeys)
	}
	return ""
}

func (s *shape) entry(t *token.Token) {
	if t.Position.Line != s.line {
		s.entries, s.line = 0, t.Position.Line
	}
	if s.depth > 0 {
		s.flowKeys++
		return
	}
	s.entries++
	at := keyColumn(t)
	for column := range s.keys {
		if column > at {
			delete(s.keys, column) // those maps have ended
		}
	}
	if t.Type == token.MappingValueType {
		s.keys[at]++
	}
}

// keyColumn is where the key before a colon begins.
func keyColumn(t *token.Token) int {
	if t.Type == token.MappingValueType && t.Prev != nil {
		return t.Prev.Position.Column
	}
	return t.Position.Column
}
