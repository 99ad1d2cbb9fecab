package mesh

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// An EjectionSum is what proxies hold against one address, or against a service or a host
// outside as a whole.
type EjectionSum struct {
	Ejection          // since the first says so, with its reason
	Sidecars []string `json:"sidecars"`
	// Of is how many sidecars are connected; of a host outside, how many gateways, which
	// are then in Sidecars.
	Of int `json:"of"`
	// By is the kind of the proxies that say so.
	By string `json:"-"`
}

func (s EjectionSum) String() string {
	said := fmt.Sprintf("eject %s", s.Address)
	switch s.Kind {
	case "unhealthy":
		said = fmt.Sprintf("find %s unhealthy", s.Address)
	case "open":
		said = "have cut it off"
	}
	return fmt.Sprintf("%s: %d of %d %ss %s since %s: %s", s.Service, len(s.Sidecars), s.Of, s.By, said, s.Since.UTC().Format("15:04"), cmp.Or(s.Why, "no reason given"))
}

// SumEjections gathers what the connected proxies of each kind say, by service and
// address.
func SumEjections(ps []Proxy) []EjectionSum {
	type key struct{ service, address, kind, by string }
	of, at := map[string]int{}, map[key]int{}
	list := []EjectionSum{}
	for _, p := range ps {
		if !p.Connected {
			continue
		}
		of[p.Kind]++
		if p.Traffic == nil {
			continue
		}
		said := map[key]bool{}
		for _, e := range p.Traffic.Ejections {
			k := key{string(e.Service), e.Address.String(), e.Kind, p.Kind}
			if strings.HasPrefix(k.service, "host:") && p.Kind != "gateway" || said[k] {
				continue // of hosts only gateways know, and each proxy counts once
			}
			said[k] = true
			i, known := at[k]
			if !known {
				i, at[k] = len(list), len(list)
				list = append(list, EjectionSum{Ejection: e, By: p.Kind})
			}
			if e.Since.Before(list[i].Since) {
				list[i].Ejection = e
			}
			list[i].Sidecars = append(list[i].Sidecars, p.Workload.String())
		}
	}
	for i := range list {
		list[i].Of = of[list[i].By]
	}
	slices.SortFunc(list, func(a, b EjectionSum) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), a.Address.Compare(b.Address), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.By, b.By))
	})
	return list
}
