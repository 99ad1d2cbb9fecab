// Package gatewayapi reads routes as the Kubernetes Gateway API writes them,
// HTTPRoute, GRPCRoute, TLSRoute and TCPRoute, and makes ours of them.
//
// The structs are our own, with the fields that have a meaning here; whatever
// else a document says is a mistake and no silence, since a route that is half
// understood leads calls where nobody wanted them.
package gatewayapi

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"sallyport/internal/mesh"
)

type metadata struct {
	Name        string            `yaml:"name"`
	Namespace   string            `yaml:"namespace"`
	Labels      map[string]string `yaml:"labels"`
	Annotations map[string]string `yaml:"annotations"`
}

type ref struct {
	Group       string  `yaml:"group"`
	Kind        string  `yaml:"kind"`
	Namespace   string  `yaml:"namespace"`
	Name        string  `yaml:"name"`
	SectionName string  `yaml:"sectionName"`
	Port        uint16  `yaml:"port"`
	Weight      *uint32 `yaml:"weight"`
}

type head struct {
	APIVersion string   `yaml:"apiVersion"`
	Kind       string   `yaml:"kind"`
	Metadata   metadata `yaml:"metadata"`
}

type parents struct {
	Parents   []ref    `yaml:"parentRefs"`
	Hostnames []string `yaml:"hostnames"`
}

type valueMatch struct {
	Type  string `yaml:"type"`
	Name  string `yaml:"name"`
	Value string `yaml:"value"`
}

type httpRoute struct {
	Head head `yaml:",inline"`
	Spec struct {
		Of    parents `yaml:",inline"`
		Rules []struct {
			Rule    rule `yaml:",inline"`
			Matches []struct {
				Path    *valueMatch  `yaml:"path"`
				Headers []valueMatch `yaml:"headers"`
				Query   []valueMatch `yaml:"queryParams"`
				Method  string       `yaml:"method"`
			} `yaml:"matches"`
		} `yaml:"rules"`
	} `yaml:"spec"`
}

type grpcRoute struct {
	Head head `yaml:",inline"`
	Spec struct {
		Of    parents `yaml:",inline"`
		Rules []struct {
			Rule    rule `yaml:",inline"`
			Matches []struct {
				Method *struct {
					Type    string `yaml:"type"`
					Service string `yaml:"service"`
					Method  string `yaml:"method"`
				} `yaml:"method"`
				Headers []valueMatch `yaml:"headers"`
			} `yaml:"matches"`
		} `yaml:"rules"`
	} `yaml:"spec"`
}

// streamRoute is a TLSRoute or a TCPRoute.
type streamRoute struct {
	Head head `yaml:",inline"`
	Spec struct {
		Of    parents `yaml:",inline"`
		Rules []struct {
			Name     string `yaml:"name"`
			Backends []ref  `yaml:"backendRefs"`
		} `yaml:"rules"`
	} `yaml:"spec"`
}

type rule struct {
	Name     string   `yaml:"name"`
	Filters  []filter `yaml:"filters"`
	Backends []ref    `yaml:"backendRefs"`
	Timeouts struct {
		Request time.Duration `yaml:"request"`
		Backend time.Duration `yaml:"backendRequest"`
	} `yaml:"timeouts"`
	Retry *struct {
		Codes    []int         `yaml:"codes"`
		Attempts *int          `yaml:"attempts"`
		Backoff  time.Duration `yaml:"backoff"`
	} `yaml:"retry"`
}

type nameValue struct {
	Name  string `yaml:"name"`
	Value string `yaml:"value"`
}

type fieldEdit struct {
	Set    []nameValue `yaml:"set"`
	Add    []nameValue `yaml:"add"`
	Remove []string    `yaml:"remove"`
}

type newPath struct {
	Type   string `yaml:"type"`
	Full   string `yaml:"replaceFullPath"`
	Prefix string `yaml:"replacePrefixMatch"`
}

type filter struct {
	Type     string     `yaml:"type"`
	Request  *fieldEdit `yaml:"requestHeaderModifier"`
	Response *fieldEdit `yaml:"responseHeaderModifier"`
	Redirect *struct {
		Scheme   string   `yaml:"scheme"`
		Hostname string   `yaml:"hostname"`
		Path     *newPath `yaml:"path"`
		Port     uint16   `yaml:"port"`
		Status   int      `yaml:"statusCode"`
	} `yaml:"requestRedirect"`
	Rewrite *struct {
		Hostname string   `yaml:"hostname"`
		Path     *newPath `yaml:"path"`
	} `yaml:"urlRewrite"`
	Mirror *struct {
		Backend  ref  `yaml:"backendRef"`
		Percent  *int `yaml:"percent"`
		Fraction *struct {
			Numerator   int  `yaml:"numerator"`
			Denominator *int `yaml:"denominator"`
		} `yaml:"fraction"`
	} `yaml:"requestMirror"`
	CORS *struct {
		Origins     []string `yaml:"allowOrigins"`
		Methods     []string `yaml:"allowMethods"`
		Headers     []string `yaml:"allowHeaders"`
		Expose      []string `yaml:"exposeHeaders"`
		Credentials bool     `yaml:"allowCredentials"`
		MaxAge      int      `yaml:"maxAge"`
	} `yaml:"cors"`
}

// A document is one route of the Gateway API.
type document struct {
	head
	parents
	routes []mesh.Route
}

var kindLine = regexp.MustCompile(`(?m)^kind:[ \t]*"?([A-Za-z]+)"?[ \t]*$`)

// Import reads a file of documents. They are of the service that their parentRefs
// name, else that of their host name in the mesh, else of service. Those of one
// service are put together by name.
func Import(file string, src []byte, service mesh.ServiceName) ([]mesh.Routes, error) {
	var docs []document
	line := 0 // that a part begins on, of the text with a line before it
	for part := range strings.SplitSeq("\n"+string(src), "\n---") {
		text := strings.Repeat("\n", max(line-1, 0)) + part
		if line == 0 {
			text = strings.TrimPrefix(part, "\n")
		}
		line += strings.Count(part, "\n") + 1 // of what separates
		if strings.TrimSpace(part) == "" {
			continue
		}
		d, err := read(file, part, text)
		if err != nil {
			return nil, err
		}
		docs = append(docs, d)
	}
	slices.SortStableFunc(docs, func(a, b document) int {
		return cmp.Or(strings.Compare(a.Metadata.Namespace, b.Metadata.Namespace), strings.Compare(a.Metadata.Name, b.Metadata.Name))
	})
	var out []mesh.Routes
	for _, d := range docs {
		of, err := d.of(service)
		if err != nil {
			return nil, fmt.Errorf("%s: %s %s: %w", file, d.Kind, d.Metadata.Name, err)
		}
		i := slices.IndexFunc(out, func(r mesh.Routes) bool { return r.Service == of })
		if i < 0 {
			i = len(out)
			out = append(out, mesh.Routes{Service: of})
		}
		hosts, err := d.hosts()
		if err != nil {
			return nil, fmt.Errorf("%s: %s %s: %w", file, d.Kind, d.Metadata.Name, err)
		}
		for _, r := range d.routes {
			r.Matches = under(hosts, r.Matches)
			for b := range r.Backends {
				if r.Backends[b].Service == of {
					r.Backends[b].Service = "" // itself
				}
			}
			out[i].Routes = append(out[i].Routes, r)
		}
	}
	return out, nil
}

func read(file, part, text string) (d document, err error) {
	m := kindLine.FindStringSubmatch(part)
	if m == nil {
		return d, fmt.Errorf("%s: a document has no kind", file)
	}
	switch m[1] {
	case "HTTPRoute":
		var doc httpRoute
		if err = mesh.DecodeYAML(file, []byte(text), &doc); err != nil {
			return d, err
		}
		d = document{head: doc.Head, parents: doc.Spec.Of}
		d.routes, err = doc.routes()
	case "GRPCRoute":
		var doc grpcRoute
		if err = mesh.DecodeYAML(file, []byte(text), &doc); err != nil {
			return d, err
		}
		d = document{head: doc.Head, parents: doc.Spec.Of}
		d.routes, err = doc.routes()
	case "TLSRoute", "TCPRoute":
		var doc streamRoute
		if err = mesh.DecodeYAML(file, []byte(text), &doc); err != nil {
			return d, err
		}
		d = document{head: doc.Head, parents: doc.Spec.Of}
		d.routes, err = doc.routes()
	default:
		return d, fmt.Errorf("%s: kind %q is none of HTTPRoute, GRPCRoute, TLSRoute and TCPRoute", file, m[1])
	}
	if err == nil && !strings.HasPrefix(d.APIVersion, "gateway.networking.k8s.io/") {
		err = fmt.Errorf("apiVersion %q is not of gateway.networking.k8s.io", d.APIVersion)
	}
	if err != nil {
		return d, fmt.Errorf("%s: %s %s: %w", file, m[1], d.Metadata.Name, err)
	}
	return d, nil
}

// hosts are the host names that calls of the routes have; none for all calls to
// the service.
func (d *document) hosts() ([]string, error) {
	if !slices.ContainsFunc(d.Hostnames, func(h string) bool { return !strings.HasSuffix(h, "."+mesh.Domain) }) {
		return nil, nil
	}
	if d.Kind == "TLSRoute" || d.Kind == "TCPRoute" {
		return nil, fmt.Errorf("host names %v: streams are carried unread, and match none", d.Hostnames)
	}
	return d.Hostnames, nil
}

// under has each match hold for calls of the hosts only, whatever their letters
// and port; "*." before one is of all names below it.
func under(hosts []string, matches []mesh.Match) []mesh.Match {
	if len(hosts) == 0 {
		return matches
	}
	if len(matches) == 0 {
		matches = []mesh.Match{{}}
	}
	var out []mesh.Match
	for _, m := range matches {
		for _, h := range hosts {
			below, any := strings.CutPrefix(h, "*")
			text := regexp.QuoteMeta(below)
			if any {
				text = ".+" + text
			}
			n := m
			n.Headers = append([]mesh.NamedText{{Name: "Host", Text: mesh.Text{Regex: "(?i)" + text + "(:[0-9]+)?"}}}, m.Headers...)
			out = append(out, n)
		}
	}
	return out
}

// of is the service whose calls the routes are about.
func (d *document) of(service mesh.ServiceName) (mesh.ServiceName, error) {
	var found []mesh.ServiceName
	for _, p := range d.Parents {
		if p.Kind == "Service" {
			found = append(found, mesh.ServiceName(p.Name))
		}
	}
	for _, h := range d.Hostnames {
		if name, ok := strings.CutSuffix(h, "."+mesh.Domain); ok {
			found = append(found, mesh.ServiceName(name))
		}
	}
	slices.Sort(found)
	found = slices.Compact(found)
	switch {
	case service != "":
		return service, nil
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return "", fmt.Errorf("it is of several services, %v: name one", found)
	}
	return "", fmt.Errorf("no parentRef is a Service and no host name is in %s: name the service", mesh.Domain)
}
