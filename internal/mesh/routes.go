package mesh

import (
	"cmp"
	"path"
	"slices"
	"strings"
)

// Routes stand in a folder of their own, one file a service or host, with the
// descriptors that translations need beside them.
const (
	routesFolder        = "routes"
	descriptorExtension = ".binpb"
	// maxDescriptors is the size of the largest file of descriptors, bytes.
	maxDescriptors = 1 << 20
)

// routes reads the folder.
func (r *reader) routes(p *Policies) {
	for _, e := range r.files.folders[routesFolder] {
		name := path.Join(routesFolder, e.Name())
		switch ext := path.Ext(name); {
		case aside(e.Name()), ext == descriptorExtension && !e.IsDir():
		case e.IsDir() || ext != testExtension:
			r.errs = append(r.errs, &Problem{File: name, Msg: "unexpected file: routes are *.yaml, and descriptors *" + descriptorExtension})
		default:
			var doc Routes
			r.yaml(name, &doc)
			if doc.Origin == (Origin{}) {
				continue // a mistake by now reported
			}
			r.descriptors(&doc)
			p.Routes = append(p.Routes, doc)
		}
	}
}

// descriptors reads what translations name. The bytes go with the routes: a
// proxy has no folder of policies.
func (r *reader) descriptors(doc *Routes) {
	for i := range doc.Routes {
		t := doc.Routes[i].Translate
		if t == nil || t.Descriptors == "" {
			continue
		}
		b, there := r.files.bytes[path.Join(routesFolder, t.Descriptors)]
		msg := ""
		switch {
		case path.Ext(t.Descriptors) != descriptorExtension || strings.Contains(t.Descriptors, "/"):
			msg = "is no file *" + descriptorExtension + " beside the routes"
		case !there:
			msg = "does not stand beside the routes"
		case len(b) == 0 || len(b) > maxDescriptors:
			msg = "is empty, or has more than 1 MiB"
		}
		if msg != "" {
			o := doc.Routes[i].Origin
			r.errs = append(r.errs, &Problem{File: o.File, Line: o.Line, near: t.Descriptors, Msg: "descriptors: " + clip(t.Descriptors) + " " + msg})
			continue
		}
		t.Set = b
	}
}

func compareRoutes(a, b Routes) int {
	return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Host, b.Host))
}

// plainRoutes returns the routes as their hash takes them, nil when there are
// none.
func plainRoutes(list []Routes) []Routes {
	if len(list) == 0 {
		return nil
	}
	list = slices.Clone(list)
	for i := range list {
		list[i].Origin = Origin{}
		list[i].Routes = without(list[i].Routes, func(r *Route) { r.Origin = Origin{} })
	}
	slices.SortStableFunc(list, compareRoutes)
	return list
}

// callers are the patterns of callers and the groups that routes name.
func (r *Routes) callers() (out []string) {
	for i := range r.Routes {
		for _, m := range r.Routes[i].allMatches() {
			out = append(out, m.From...)
		}
		for _, f := range r.Routes[i].Faults {
			out = append(out, f.Callers...)
		}
	}
	return out
}

// allMatches are those of the route, its faults and its shadows.
func (r *Route) allMatches() []Match {
	all := slices.Clone(r.Matches)
	for i := range r.Faults {
		all = append(all, r.Faults[i].Match...)
	}
	for i := range r.Shadows {
		all = append(all, r.Shadows[i].Match...)
	}
	return all
}

// claimed is before the name of a claim in RateLimit.By.
const claimed = "claim:"

// Claim is by which claim of the caller's token calls are counted apart; empty for
// none.
func (l *RateLimit) Claim() string {
	name, is := strings.CutPrefix(l.By, claimed)
	if !is {
		return ""
	}
	return name
}

// asksClaims says whether calls take their route, or are kept together, by a claim.
func (r *Routes) asksClaims() bool {
	if r == nil {
		return false
	}
	by := func(s *Sticky) bool { return s != nil && s.By == "claim" }
	return by(r.Balance.Hash) || slices.ContainsFunc(r.Routes, func(x Route) bool {
		return by(x.Sticky) || x.Limit != nil && x.Limit.Claim() != "" || slices.ContainsFunc(x.allMatches(), func(m Match) bool {
			return len(m.Claims) > 0 || m.Region != nil && m.Region.Claim != ""
		})
	})
}

// routesOf are the routes of a service: one file, or none.
func (s *Snapshot) routesOf(name ServiceName) []Routes {
	for i := range s.Routes {
		if s.Routes[i].Service == name {
			return s.Routes[i : i+1]
		}
	}
	return nil
}

// RoutesOf returns the routes of a service, nil when it has none.
func (s *Snapshot) RoutesOf(name ServiceName) *Routes {
	if r := s.routesOf(name); name != "" && r != nil {
		return &r[0]
	}
	return nil
}

// Hosts are those that rewrites have the service see.
func (r *Routes) Hosts() map[string]bool {
	out := map[string]bool{}
	if r == nil {
		return out
	}
	for i := range r.Routes {
		if h := r.Routes[i].Rewrite.Host; h != "" {
			out[h] = true
		}
	}
	return out
}

// Subset returns the subset of that name, nil when there is none.
func (r *Routes) Subset(name string) *Subset {
	if r == nil {
		return nil
	}
	for i := range r.Subsets {
		if r.Subsets[i].Name == name {
			return &r.Subsets[i]
		}
	}
	return nil
}

// Translation is that of the service: its routes have one, or none.
func (r *Routes) Translation() *Translate {
	if r == nil {
		return nil
	}
	for i := range r.Routes {
		if t := r.Routes[i].Translate; t != nil {
			return t
		}
	}
	return nil
}
