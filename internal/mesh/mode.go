package mesh

import (
	"cmp"
	"path"
	"slices"
)

// modesFile says how strictly the files of rows are taken.
const modesFile = "modes.yaml"

// A Mode says what becomes of a call that a file of rows denies.
type Mode string

// The modes. A file without one is enforced.
const (
	// Enforce refuses the call.
	Enforce Mode = "enforce"
	// Warn lets it pass with a record and tells the caller in a header.
	Warn Mode = "warn"
	// Observe lets it pass with a record.
	Observe Mode = "observe"
)

var modes = []string{string(Enforce), string(Warn), string(Observe)}

// A FileMode is the mode of one file of rows; enforced files have none.
type FileMode struct {
	File   string `json:"file"`
	Mode   Mode   `json:"mode"`
	Origin Origin `json:"origin"`
}

// Guard reports whether the row is one of the guardrails.
func (r *Rule) Guard() bool { return path.Base(r.Origin.File) == guardFile }

// ModeOf returns the mode of the file that a row stands in. What no row allows
// is denied by access.csv.
func (s *Snapshot) ModeOf(r *Rule) Mode {
	file := accessFile
	if r != nil && r.Guard() {
		file = guardFile
	}
	for _, m := range s.Modes {
		if m.File == file {
			return m.Mode
		}
	}
	return Enforce
}

type modesDoc struct {
	at         `yaml:"-"`
	Access     string `yaml:"access.csv"`
	Guardrails string `yaml:"guardrails.csv"`
}

func (d modesDoc) nouns() []FileMode {
	var out []FileMode
	for _, m := range []FileMode{{accessFile, Mode(d.Access), d.origin}, {guardFile, Mode(d.Guardrails), d.origin}} {
		if m.Mode != "" && m.Mode != Enforce {
			out = append(out, m)
		}
	}
	return out
}

func compareModes(a, b FileMode) int { return cmp.Compare(a.File, b.File) }

// modes checks what modes.yaml says. A mode that nobody knows is never taken
// for a lenient one.
func (v *validator) modes() {
	seen := map[string]Origin{}
	for _, m := range v.p.Modes {
		if m.File != accessFile && m.File != guardFile {
			v.item(m.Origin, m.File, "%q has no mode: only %s and %s have rows", m.File, accessFile, guardFile)
		}
		if m.Mode != Warn && m.Mode != Observe {
			v.item(m.Origin, string(m.Mode), "%s: unknown mode %q%s", m.File, clip(string(m.Mode)), didYouMean(string(m.Mode), modes))
		}
		twice(v, seen, m.File, m.Origin, "mode of")
	}
}

// sameFile clears where a row stands, and keeps the file when that matters.
func (p *Policies) sameFile(o Origin) Origin {
	if len(p.Modes) == 0 {
		return Origin{}
	}
	return Origin{File: o.File}
}

// withoutOrigins returns the modes as their hash takes them, nil when there are
// none.
func withoutOrigins(list []FileMode) []FileMode {
	if len(list) == 0 {
		return nil
	}
	list = slices.Clone(list)
	for i := range list {
		list[i].Origin = Origin{}
	}
	slices.SortFunc(list, compareModes)
	return list
}
