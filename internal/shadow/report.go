package shadow

import (
	"cmp"
	"encoding/json"
	"net/http"
	"slices"
	"sync"
	"time"

	"sallyport/internal/archive"
	"sallyport/internal/audit"
)

// Reports collects differences by route, method, shape of the path and field.
// The zero value is ready.
type Reports struct {
	mu    sync.Mutex // guards the fields below
	since time.Time
	by    map[endpoint]*tally
}

type endpoint struct{ route, shadow, method, path string }

// A tally counts the answers of one endpoint.
type tally struct {
	compared, differing int
	learned             int // compared with a second primary, too
	fields              map[string]*seenField
}

type seenField struct {
	differs, noise int
	sample         Sample
}

// The bounds keep callers from filling the memory with paths and fields.
const (
	maxEndpoints = 500
	maxFields    = 200
)

// Seen is the call whose answers were compared.
type Seen struct{ Route, Shadow, Method, Path, Trace string }

// Add counts a pair of answers. Noise is where a second primary differs from
// the first, if learned says that there was one.
func (r *Reports) Add(call Seen, differs, noise []Difference, learned bool, redact *archive.Redactor) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.by == nil {
		r.by, r.since = map[endpoint]*tally{}, time.Now().UTC()
	}
	e := endpoint{call.Route, call.Shadow, call.Method, audit.Template(call.Path)}
	t := r.by[e]
	if t == nil {
		if len(r.by) >= maxEndpoints {
			e.path = "(others)"
		}
		if t = r.by[e]; t == nil {
			t = &tally{fields: map[string]*seenField{}}
			r.by[e] = t
		}
	}
	t.compared++
	if learned {
		t.learned++
	}
	if len(differs) > 0 {
		t.differing++
	}
	once := map[string]bool{}
	for i := range differs {
		d := &differs[i]
		f := t.field(d.Field)
		if once[d.Field] {
			continue
		}
		once[d.Field] = true
		if f.differs++; f.differs == 1 {
			f.sample = Sample{Trace: call.Trace, Primary: text(d.a, d, redact), Shadow: text(d.b, d, redact)}
		}
	}
	clear(once)
	for i := range noise {
		if n := noise[i].Field; !once[n] {
			once[n] = true
			t.field(n).noise++
		}
	}
}

func (t *tally) field(name string) *seenField {
	f := t.fields[name]
	if f == nil && len(t.fields) >= maxFields {
		name = "(others)"
		f = t.fields[name]
	}
	if f == nil {
		f = &seenField{}
		t.fields[name] = f
	}
	return f
}

// A Report is what Reports has collected, the worst first.
type Report struct {
	Since     time.Time  `json:"since"`
	Endpoints []Endpoint `json:"endpoints"`
}

// An Endpoint is what was compared of one route, method and shape of path.
type Endpoint struct {
	Route     string  `json:"route"`
	Shadow    string  `json:"shadow"`
	Method    string  `json:"method"`
	Path      string  `json:"path"`
	Compared  int     `json:"compared"`
	Differing int     `json:"differing"`
	Learned   int     `json:"learned"`
	Fields    []Found `json:"fields,omitempty"`
}

// Found is a field that differed.
type Found struct {
	Field   string `json:"field"`
	Differs int    `json:"differs"`
	// Noise is in how many of the learned pairs two primaries differ there.
	Noise   int    `json:"noise"`
	Verdict string `json:"verdict"`
	Sample  Sample `json:"sample,omitzero"`
}

// The verdicts on a field.
const (
	Differs = "differs"
	Noise   = "noise" // two primaries differ there as well
)

// A Sample is the first pair of values that differed.
type Sample struct {
	Trace   string `json:"trace"`
	Primary string `json:"primary"`
	Shadow  string `json:"shadow"`
}

// By how much a field must differ more often between primary and shadow than
// between two primaries: the thresholds of Diffy.
const (
	relative = 0.20
	absolute = 0.0003
)

// verdict judges a field.
func (t *tally) verdict(f *seenField) string {
	if t.learned == 0 || f.noise == 0 {
		return Differs
	}
	raw, noise := float64(f.differs)/float64(t.compared), float64(f.noise)/float64(t.learned)
	if raw-noise > absolute && (raw-noise)/(raw+noise) > relative {
		return Differs
	}
	return Noise
}

// Report is the state now.
func (r *Reports) Report() Report {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := Report{Since: r.since, Endpoints: []Endpoint{}}
	for e, t := range r.by {
		x := Endpoint{Route: e.route, Shadow: e.shadow, Method: e.method, Path: e.path, Compared: t.compared, Differing: t.differing, Learned: t.learned}
		for name, f := range t.fields {
			if f.differs > 0 {
				x.Fields = append(x.Fields, Found{name, f.differs, f.noise, t.verdict(f), f.sample})
			}
		}
		slices.SortFunc(x.Fields, func(a, b Found) int {
			return cmp.Or(cmp.Compare(a.Verdict, b.Verdict), cmp.Compare(b.Differs, a.Differs), cmp.Compare(a.Field, b.Field))
		})
		out.Endpoints = append(out.Endpoints, x)
	}
	slices.SortFunc(out.Endpoints, func(a, b Endpoint) int {
		return cmp.Or(cmp.Compare(b.Differing, a.Differing), cmp.Compare(a.Route, b.Route), cmp.Compare(a.Shadow, b.Shadow), cmp.Compare(a.Path, b.Path), cmp.Compare(a.Method, b.Method))
	})
	return out
}

// Report is what was compared so far.
func (m *Mirror) Report() Report { return m.report.Report() }

// ReportHandler serves the report on the admin socket.
func (m *Mirror) ReportHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(m.Report()) // who asked has gone
	})
}
