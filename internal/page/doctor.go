package page

import (
	"cmp"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"sallyport/internal/control"
	"sallyport/internal/mesh"
)

// awayFor is how long a proxy may be away before it is a finding: a restart takes
// less.
const awayFor = 30 * time.Second

// A finding is something amiss in the mesh, as the issuer sees it. Codes are those
// of docs/doctor.md and docs/operate.md.
type finding struct {
	Code  string
	Fails bool // or it may fail soon
	Of    string
	What  string
	Next  string
}

// A build is what proxies were built from.
type build struct {
	Version           string
	Sidecars, Gateway int
	// On are the first few nodes.
	On []string
}

// maxNodes is how many nodes a build names.
const maxNodes = 3

// doctorView is what is amiss, and which version runs where.
func (p *Page) doctorView(r *http.Request, _ *visitor) (any, error) {
	proxies := p.cfg.Proxies()
	list := p.findings(proxies)
	rows, more, err := p.paged(r, len(list), pageRows)
	if err != nil {
		return nil, err
	}
	return map[string]any{
		"State": stateOf(r), "Findings": list[rows[0]:rows[1]], "Rows": len(list), "More": more,
		"Builds": builds(proxies), "Own": p.cfg.Version, "Proxies": len(proxies),
	}, nil
}

// findings are what fails first.
func (p *Page) findings(proxies []mesh.Proxy) (out []finding) {
	now, st := p.cfg.Now(), p.cfg.Status()
	add := func(fails bool, code, of, next, format string, args ...any) {
		out = append(out, finding{code, fails, of, fmt.Sprintf(format, args...), next})
	}
	if st.LastRefusal != "" {
		first, _, _ := strings.Cut(st.LastRefusal, "\n")
		add(true, "SP013", "issuer", "mend the files, and check them: sallyport policy test", "The newest edit was refused, revision %d stays in force: %s", st.PolicyRevision, first)
	}
	for _, x := range proxies {
		of := x.Workload.String()
		switch {
		case !x.SVIDExpires.IsZero() && !now.Before(x.SVIDExpires):
			add(true, "SP012", of, "on its node: sallyport doctor", "Its SVID has expired.")
		case !x.Connected && now.Sub(x.LastSeen) > awayFor:
			add(false, "SP011", of, "on its node: sallyport doctor", "It is not connected to an issuer; its SVID ends at %s.", x.SVIDExpires.UTC().Format(time.RFC3339))
		case x.State == mesh.Rejected:
			add(true, "SP013", of, "sallyport policy status", "It refuses the policy: %s", x.Reason)
		case x.Connected && x.State != mesh.Synced:
			add(true, "SP013", of, "sallyport policy status", "It acts on revision %d of %d.", x.PolicyRevision, st.PolicyRevision)
		}
		if x.Version != "" && p.cfg.Version != "" && x.Version != p.cfg.Version {
			add(false, "SP002", of, "go over to one release: issuer, gateways, sidecars", "It is of another version than the issuer: %s", x.Version)
		}
	}
	if s := p.cfg.Roots(); s.Phase != "steady" && s.Live > s.Confirmed {
		add(false, "UP004", "issuer", "sallyport ca status", "The root is being replaced, and %d of %d proxies are not ready for the step %s.", s.Live-s.Confirmed, s.Live, cmp.Or(string(s.Next), "that follows"))
	}
	slices.SortStableFunc(out, func(a, b finding) int {
		switch {
		case a.Fails == b.Fails:
			return cmp.Compare(a.Code, b.Code)
		case a.Fails:
			return -1
		}
		return 1
	})
	return out
}

// builds counts proxies by what they were built from, the most frequent first.
func builds(proxies []mesh.Proxy) []*build {
	by := map[string]*build{}
	for _, x := range proxies {
		b := by[x.Version]
		if b == nil {
			b = &build{Version: x.Version}
			by[x.Version] = b
		}
		if x.Kind == control.KindGateway {
			b.Gateway++
		} else {
			b.Sidecars++
		}
		if len(b.On) < maxNodes {
			b.On = append(b.On, x.Agent.String())
		}
	}
	return slices.SortedFunc(maps.Values(by), func(a, b *build) int {
		return cmp.Or(cmp.Compare(b.Sidecars+b.Gateway, a.Sidecars+a.Gateway), cmp.Compare(a.Version, b.Version))
	})
}
