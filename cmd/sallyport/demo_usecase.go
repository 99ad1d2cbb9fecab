package main

import (
	"fmt"
	"slices"
)

// The uses of a mesh. Every bounded run of the demo shows each of them.
const (
	useCanary      = "canary"
	useProgressive = "blue-green-and-progressive-delivery"
	useBreaker     = "circuit-breaking"
	useRetries     = "timeouts-and-retries"
	useFault       = "fault-injection"
	useMTLS        = "mutual-tls"
	useAccess      = "identity-aware-access"
	useCredentials = "credentials-and-audit"
	useSignals     = "golden-signals"
	useTracing     = "tracing"
	useMap         = "live-map"
	usePolicy      = "policy-without-code"
	useNaming      = "naming-and-discovery"
	useTranslation = "protocol-translation"
	useShadow      = "shadowing-and-archives"
)

var useCases = []string{
	useCanary, useProgressive, useBreaker, useRetries, useFault, useMTLS, useAccess, useCredentials,
	useSignals, useTracing, useMap, usePolicy, useNaming, useTranslation, useShadow,
}

// A useCase says whether a use of a mesh was shown: it was tried, and every
// promise that belongs to it was kept.
type useCase struct {
	Name     string `json:"name"`
	OK       bool   `json:"ok"`
	Promises int    `json:"promises"`
	Detail   string `json:"detail,omitempty"`
}

// of has the verdicts from now on belong to a use case, or to none.
func (v *verdicts) of(use string) { v.use = use }

// join adds what was found beside.
func (v *verdicts) join(o *verdicts) {
	v.OK = v.OK && o.OK
	v.Cases.Tried += o.Cases.Tried
	v.Cases.Passed += o.Cases.Passed
	v.Cases.Failed += o.Cases.Failed
	v.Verdicts = append(v.Verdicts, o.Verdicts...)
	for name, f := range o.Figures {
		v.Figures[name] = f
	}
}

// judgeUseCases makes of the verdicts one for each use case. One that nothing
// was tried of is a promise broken.
func (v *verdicts) judgeUseCases() {
	v.of("")
	for _, name := range useCases {
		if !slices.ContainsFunc(v.Verdicts, func(x verdict) bool { return x.UseCase == name }) {
			v.add(name+" is shown", fmt.Errorf("nothing was tried of it"))
		}
		u := useCase{Name: name, OK: true}
		for _, x := range v.Verdicts {
			if x.UseCase != name {
				continue
			}
			u.Promises++
			if !x.OK && u.OK {
				u.OK, u.Detail = false, x.Name+": "+x.Detail
			}
		}
		u.OK = u.OK && u.Promises > 0
		v.UseCases = append(v.UseCases, u)
	}
}
