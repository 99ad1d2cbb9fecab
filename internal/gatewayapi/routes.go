package gatewayapi

import (
	"cmp"
	"fmt"
	"strings"
	"time"

	"sallyport/internal/mesh"
)

func (d *httpRoute) routes() (out []mesh.Route, err error) {
	for i, x := range d.Spec.Rules {
		r, err := x.Rule.route(d.Head, i)
		if err != nil {
			return nil, err
		}
		for _, m := range x.Matches {
			var n mesh.Match
			if m.Path != nil {
				if n.Path, err = pathOf(m.Path); err != nil {
					return nil, err
				}
			}
			n.Method = m.Method
			if n.Headers, err = named(m.Headers, strings.ToLower); err != nil {
				return nil, err
			}
			if n.Query, err = named(m.Query, strings.Clone); err != nil {
				return nil, err
			}
			r.Matches = append(r.Matches, n)
		}
		out = append(out, r)
	}
	return out, nil
}

func (d *grpcRoute) routes() (out []mesh.Route, err error) {
	for i, x := range d.Spec.Rules {
		r, err := x.Rule.route(d.Head, i)
		if err != nil {
			return nil, err
		}
		for _, m := range x.Matches {
			var n mesh.Match
			if g := m.Method; g != nil {
				if g.Type != "" && g.Type != "Exact" {
					return nil, fmt.Errorf("method match of type %s is not supported, Exact is", g.Type)
				}
				n.GRPC = &mesh.GRPCMethod{Service: g.Service, Method: g.Method}
			}
			if n.Headers, err = named(m.Headers, strings.ToLower); err != nil {
				return nil, err
			}
			r.Matches = append(r.Matches, n)
		}
		out = append(out, r)
	}
	return out, nil
}

func (d *streamRoute) routes() (out []mesh.Route, err error) {
	for i, x := range d.Spec.Rules {
		r := mesh.Route{Name: cmp.Or(x.Name, fmt.Sprintf("%s-%d", d.Head.Metadata.Name, i+1))}
		if r.Backends, err = backends(x.Backends); err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// pathOf is a path match; without a type it is of a prefix, without a value of "/".
func pathOf(m *valueMatch) (*mesh.Text, error) {
	value := cmp.Or(m.Value, "/")
	switch m.Type {
	case "Exact":
		return &mesh.Text{Exact: value}, nil
	case "", "PathPrefix":
		return &mesh.Text{Prefix: cmp.Or(strings.TrimRight(value, "/"), "/")}, nil // with or without the slash it is the same
	case "RegularExpression":
		return &mesh.Text{Regex: value}, nil
	}
	return nil, fmt.Errorf("path match of type %s is not supported: Exact, PathPrefix and RegularExpression are", m.Type)
}

// named leaves out the second entry of a name, as the Gateway API has it; fold
// makes names equal that are the same.
func named(list []valueMatch, fold func(string) string) (out []mesh.NamedText, err error) {
	seen := map[string]bool{}
	for _, m := range list {
		if seen[fold(m.Name)] {
			continue
		}
		seen[fold(m.Name)] = true
		t := mesh.NamedText{Name: m.Name}
		switch m.Type {
		case "", "Exact":
			t.Exact = m.Value
		case "RegularExpression":
			t.Regex = m.Value
		default:
			return nil, fmt.Errorf("match of %s of type %s is not supported: Exact and RegularExpression are", m.Name, m.Type)
		}
		out = append(out, t)
	}
	return out, nil
}

func backends(list []ref) (out []mesh.Backend, err error) {
	for _, r := range list {
		b, err := backend(r)
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}

func backend(r ref) (mesh.Backend, error) {
	if r.Group != "" || r.Kind != "" && r.Kind != "Service" {
		return mesh.Backend{}, fmt.Errorf("backend %s is a %s: only a Service can be one", r.Name, cmp.Or(r.Kind, r.Group))
	}
	b := mesh.Backend{Service: mesh.ServiceName(r.Name), Weight: 1}
	if r.Weight != nil {
		b.Weight = *r.Weight
	}
	return b, nil
}

func (x *rule) route(d head, i int) (r mesh.Route, err error) {
	r.Name = cmp.Or(x.Name, fmt.Sprintf("%s-%d", d.Metadata.Name, i+1))
	if r.Backends, err = backends(x.Backends); err != nil {
		return r, err
	}
	r.Timeouts = mesh.Timeouts{Request: x.Timeouts.Request, Try: x.Timeouts.Backend}
	if y := x.Retry; y != nil {
		r.Retry = &mesh.Retry{Attempts: 1, Codes: y.Codes, Base: y.Backoff}
		if y.Attempts != nil {
			r.Retry.Attempts = *y.Attempts
		}
	}
	for _, f := range x.Filters {
		if err := apply(&r, f); err != nil {
			return r, fmt.Errorf("rule %s: %w", r.Name, err)
		}
	}
	if len(r.Backends) == 0 && r.Redirect == nil {
		r.Respond = &mesh.Respond{Status: 500} // as the Gateway API has it, not the service itself
	}
	return r, nil
}

func apply(r *mesh.Route, f filter) (err error) {
	switch {
	case f.Type == "RequestHeaderModifier" && f.Request != nil:
		r.Rewrite.Fields, err = f.Request.edit()
	case f.Type == "ResponseHeaderModifier" && f.Response != nil:
		r.Answer, err = f.Response.edit()
	case f.Type == "RequestRedirect" && f.Redirect != nil:
		d := f.Redirect
		r.Redirect = &mesh.Redirect{Scheme: d.Scheme, Host: d.Hostname, Port: d.Port, Status: cmp.Or(d.Status, 302)}
		if r.Redirect.Path, r.Redirect.Prefix, err = d.Path.parts(); d.Path == nil && d.Scheme == "" && d.Hostname == "" && d.Port == 0 {
			r.Redirect.Scheme = "http" // that of the call
		}
	case f.Type == "URLRewrite" && f.Rewrite != nil:
		r.Rewrite.Host = f.Rewrite.Hostname
		r.Rewrite.Path, r.Rewrite.Prefix, err = f.Rewrite.Path.parts()
	case f.Type == "RequestMirror" && f.Mirror != nil:
		err = mirror(r, f)
	case f.Type == "CORS" && f.CORS != nil:
		c := f.CORS
		r.CORS = &mesh.CORS{Origins: c.Origins, Methods: c.Methods, Headers: c.Headers, Expose: c.Expose, Credentials: c.Credentials,
			MaxAge: time.Duration(cmp.Or(c.MaxAge, 5)) * time.Second}
	default:
		err = fmt.Errorf("filter of type %q is not supported, or says nothing", f.Type)
	}
	return err
}

// mirror copies every call that may be copied, unless a part is said.
func mirror(r *mesh.Route, f filter) error {
	m := f.Mirror
	b, err := backend(m.Backend)
	if err != nil {
		return err
	}
	share := mesh.Whole
	switch {
	case m.Percent != nil && m.Fraction != nil:
		return fmt.Errorf("percent and fraction are both there")
	case m.Percent != nil:
		share = *m.Percent * 100
	case m.Fraction != nil:
		of := 100
		if m.Fraction.Denominator != nil {
			of = *m.Fraction.Denominator
		}
		if of < 1 || m.Fraction.Numerator < 0 || m.Fraction.Numerator > of {
			return fmt.Errorf("fraction %d of %d is none", m.Fraction.Numerator, of)
		}
		share = m.Fraction.Numerator * mesh.Whole / of
	}
	if share < 0 || share > mesh.Whole {
		return fmt.Errorf("mirrored part is not from 0 to 100 percent")
	}
	if share == 0 {
		return nil
	}
	r.Shadows = append(r.Shadows, mesh.Shadow{Name: fmt.Sprintf("%s-mirror-%d", r.Name, len(r.Shadows)+1), Service: b, Share: mesh.Share(share), Writes: true})
	return nil
}

func (e *fieldEdit) edit() (out mesh.FieldEdit, err error) {
	put := func(m *map[string]string, list []nameValue) {
		for _, f := range list {
			if *m == nil {
				*m = map[string]string{}
			}
			if _, twice := (*m)[f.Name]; twice {
				err = fmt.Errorf("header %s is edited twice", f.Name)
			}
			(*m)[f.Name] = f.Value
		}
	}
	put(&out.Set, e.Set)
	put(&out.Add, e.Add)
	out.Remove = e.Remove
	return out, err
}

func (p *newPath) parts() (whole, prefix string, err error) {
	switch {
	case p == nil:
		return "", "", nil
	case p.Type == "ReplaceFullPath":
		return cmp.Or(p.Full, "/"), "", nil
	case p.Type == "ReplacePrefixMatch":
		return "", cmp.Or(p.Prefix, "/"), nil
	}
	return "", "", fmt.Errorf("path of type %q is neither ReplaceFullPath nor ReplacePrefixMatch", p.Type)
}
