package mesh

import (
	"cmp"
	"path"
	"slices"
	"strings"
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

// modeOfDestination checks the mode of one host.
func (v *validator) modeOfDestination(d Destination) {
	switch d.Mode {
	case "", Enforce, Warn, Observe:
	default:
		v.item(d.Origin, string(d.Mode), "unknown mode %q%s", clip(string(d.Mode)), didYouMean(string(d.Mode), modes))
	}
}

// ModeTo returns the mode of access.csv for calls to a destination: that of the
// host, or else that of the file.
func (s *Snapshot) ModeTo(dst string) Mode {
	if host, ok := strings.CutPrefix(dst, "host:"); ok {
		if d, ok := s.DestinationOf(host); ok && d.Mode != "" {
			return d.Mode
		}
	}
	return s.ModeOf(nil)
}

// moded says that some destination has a mode of its own.
func (s *Snapshot) moded() bool {
	return slices.ContainsFunc(s.Destinations, func(d Destination) bool { return d.Mode != "" })
}

// Lenient reports whether anything that rows deny may pass.
func (s *Snapshot) Lenient() bool { return len(s.Modes) > 0 || s.moded() }

// modesOf returns the destinations by which a nameserver finds the mode of a
// host, and of each no more than that.
func (s *Snapshot) modesOf() (out []Destination) {
	if !s.moded() {
		return nil
	}
	for _, d := range s.Destinations {
		below := func(p Destination) bool { return p.Mode != "" && MatchHost(p.Host, d.Host) }
		if d.Mode != "" || slices.ContainsFunc(s.Destinations, below) {
			out = append(out, Destination{Host: d.Host, Proto: d.Proto, SNI: d.SNI, Mode: d.Mode})
		}
	}
	return out
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
