package audit

import (
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	namePrefix = "sallyport-audit/"
	agentPath  = "/spire/agent/"
)

// LogName is what a witness calls the audit log of the proxy that serves a
// workload on a node. It stands in every checkpoint that is cosigned, so that a
// log which was cosigned for one proxy cannot be shown as that of another. Path
// segments of a SPIFFE ID hold no '@'.
func LogName(workload, agent spiffeid.ID) string {
	return namePrefix + workload.TrustDomain().Name() + workload.Path() + "@" + strings.TrimPrefix(agent.Path(), agentPath)
}

// IssuerLogName is the name of the log of an issuer, which is no workload.
func IssuerLogName(td spiffeid.TrustDomain, issuer string) string {
	return namePrefix + td.Name() + "/@" + issuer
}

// A LogOwner is who keeps a log.
type LogOwner struct {
	// Workload and Agent are zero for the log of an issuer.
	Workload, Agent spiffeid.ID
	// Issuer is empty for the log of a proxy.
	Issuer string
}

func (o LogOwner) String() string {
	if o.Issuer != "" {
		return "issuer " + o.Issuer
	}
	return o.Workload.String() + " on " + o.Agent.String()
}

// ParseLogName reads what LogName or IssuerLogName has made.
func ParseLogName(name string) (o LogOwner, ok bool) {
	rest, ok := strings.CutPrefix(name, namePrefix)
	if !ok {
		return o, false
	}
	path, node, ok := strings.Cut(rest, "@")
	if !ok || node == "" {
		return o, false
	}
	if td, found := strings.CutSuffix(path, "/"); found {
		if _, err := spiffeid.TrustDomainFromString(td); err != nil {
			return o, false
		}
		return LogOwner{Issuer: node}, true
	}
	var err error
	if o.Workload, err = spiffeid.FromString("spiffe://" + path); err != nil || o.Workload.Path() == "" {
		return LogOwner{}, false
	}
	if o.Agent, err = spiffeid.FromPath(o.Workload.TrustDomain(), agentPath+node); err != nil {
		return LogOwner{}, false
	}
	return o, LogName(o.Workload, o.Agent) == name
}
