package mesh

import (
	"cmp"
	"slices"
	"time"
)

// A Plan is how the calls of a route move from its other backends to one of
// them, the canary. Until somebody starts it the weights of the backends hold;
// from then on the issuer says which share the canary has, within this plan.
type Plan struct {
	// Canary is one of the backends of the route.
	Canary Ref `json:"canary"`
	// Steps are taken in order; the shares rise, and the last one is 100 %. A
	// single one of 100 % is blue/green.
	Steps []Step `json:"steps"`
	// Judge says when the canary does as well as the others.
	Judge Judging `json:"judge,omitzero"`
}

// A Ref names a backend of a route: the service of the file when Service is
// empty, narrowed to Subset.
type Ref struct {
	Service ServiceName `json:"service,omitempty"`
	Subset  string      `json:"subset,omitempty"`
}

func (r Ref) String() string {
	switch {
	case r.Subset == "":
		return string(r.Service)
	case r.Service == "":
		return r.Subset
	}
	return string(r.Service) + " (" + r.Subset + ")"
}

// A Step gives the canary a share of the calls.
type Step struct {
	Share Share `json:"share"`
	// For is how long it lasts at least. It is over when by then the canary is
	// judged to do well.
	For time.Duration `json:"for"`
	// Gate keeps the next step from being taken before somebody promotes.
	Gate bool `json:"gate,omitempty"`
}

// Judging compares the canary with the other backends by the calls of the same
// stretch of time. Zero values are the defaults.
type Judging struct {
	// Window is that stretch. Default 1 min.
	Window time.Duration `json:"window,omitempty"`
	// Minimum is how many calls each side needs in it to be judged well.
	// Default 100.
	Minimum int `json:"min_requests,omitempty"`
	// Errors is how many more of its calls the canary may fail, in points of
	// percent. Default 1 %.
	Errors Share `json:"errors,omitempty"`
	// Confidence is how sure a verdict has to be. Default 99 %.
	Confidence Share `json:"confidence,omitempty"`
	// Latency is nil for its defaults.
	Latency *Latency `json:"latency,omitempty"`
	// Patience is how long a step waits for enough calls beyond its time, until
	// somebody has to decide. Default 30 min.
	Patience time.Duration `json:"patience,omitempty"`
}

// Latency compares a quantile of the time until an answer begins.
type Latency struct {
	// Quantile is of the calls of each side. Default 95 %.
	Quantile Share `json:"quantile"`
	// Ratio is how many times that of the others the canary's may be. Default
	// 1.5; 0 leaves latency out.
	Ratio float64 `json:"ratio"`
}

func (l *Latency) preset() { *l = usualLatency }

var usualLatency = Latency{Quantile: 95_00, Ratio: 1.5}

// WithDefaults fills in what is not written.
func (j Judging) WithDefaults() Judging {
	j.Window = cmp.Or(j.Window, time.Minute)
	j.Minimum = cmp.Or(j.Minimum, 100)
	j.Errors = cmp.Or(j.Errors, 1_00)
	j.Confidence = cmp.Or(j.Confidence, 99_00)
	j.Patience = cmp.Or(j.Patience, 30*time.Minute)
	if j.Latency == nil {
		l := usualLatency
		j.Latency = &l
	}
	return j
}

// A CanaryShare is the share that the canary of a route has by a rollout that
// was started, in the place of the weights of the route.
type CanaryShare struct {
	Service ServiceName `json:"service"`
	Route   string      `json:"route"`
	Share   Share       `json:"share"`
	// Watch asks for counts of the calls.
	Watch bool `json:"watch,omitempty"`
}

// canaryOf is the place of the canary among the backends, -1 when it is none.
func (r *Route) canaryOf(own ServiceName) int {
	return slices.IndexFunc(r.Backends, func(b Backend) bool {
		return cmp.Or(b.Service, own) == cmp.Or(r.Plan.Canary.Service, own) && b.Subset == r.Plan.Canary.Subset
	})
}

// IsCanary says whether a backend of a route of a service is the canary of its
// plan.
func (r *Route) IsCanary(own ServiceName, i int) bool {
	return r.Plan != nil && r.canaryOf(own) == i
}

// PlanOf returns the plan of a route, and a hash of all that a rollout by it
// goes by: one that was started holds only as long as that stays. False when
// there is none.
func (p *Policies) PlanOf(service ServiceName, route string) (plan Plan, hash string, ok bool) {
	if p == nil || service == "" {
		return Plan{}, "", false
	}
	for i := range p.Routes {
		if f := &p.Routes[i]; f.Service == service {
			for j := range f.Routes {
				if r := &f.Routes[j]; r.Name == route && r.Plan != nil {
					plan = *r.Plan
					plan.Canary.Service = cmp.Or(plan.Canary.Service, service)
					return plan, hashJSON([]any{r.Plan, r.Backends, f.Subsets}), true
				}
			}
		}
	}
	return Plan{}, "", false
}

// Plans are the routes that have one, by service and route.
func (p *Policies) Plans(yield func(service ServiceName, route string) bool) {
	if p == nil {
		return
	}
	for i := range p.Routes {
		f := &p.Routes[i]
		for j := range f.Routes {
			if f.Routes[j].Plan != nil && !yield(f.Service, f.Routes[j].Name) {
				return
			}
		}
	}
}

func compareShares(a, b CanaryShare) int {
	return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Route, b.Route))
}

// sharesOf are those of the routes of a service.
func (s *Snapshot) sharesOf(name ServiceName) (out []CanaryShare) {
	for _, c := range s.Shares {
		if c.Service == name {
			out = append(out, c)
		}
	}
	return out
}

// ShareOf is the share that a canary has by a rollout; false while the weights
// of its route hold.
func (s *Snapshot) ShareOf(service ServiceName, route string) (CanaryShare, bool) {
	for _, c := range s.Shares {
		if c.Service == service && c.Route == route {
			return c, true
		}
	}
	return CanaryShare{}, false
}
