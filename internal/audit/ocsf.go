package audit

import (
	"encoding/json"
	"strings"
)

// ocsfVersion is the version of the Open Cybersecurity Schema Framework that
// OCSF writes.
const ocsfVersion = "1.3.0"

// The classes of OCSF that records become.
const (
	ocsfAuthentication = 3002
	ocsfNetwork        = 4001
	ocsfHTTP           = 4002
	ocsfDNS            = 4003
	ocsfAPI            = 6003
)

type ocsfEvent struct {
	ActivityID  int    `json:"activity_id"`
	CategoryUID int    `json:"category_uid"`
	ClassUID    int    `json:"class_uid"`
	TypeUID     int    `json:"type_uid"`
	SeverityID  int    `json:"severity_id"`
	Time        int64  `json:"time"`
	StartTime   int64  `json:"start_time,omitempty"`
	EndTime     int64  `json:"end_time,omitempty"`
	Count       uint64 `json:"count,omitempty"`
	Duration    int64  `json:"duration,omitempty"`
	// ActionID and DispositionID are of the profile security_control.
	ActionID      int          `json:"action_id,omitempty"`
	DispositionID int          `json:"disposition_id,omitempty"`
	StatusID      int          `json:"status_id"`
	StatusCode    string       `json:"status_code,omitempty"`
	StatusDetail  string       `json:"status_detail,omitempty"`
	Message       string       `json:"message,omitempty"`
	Metadata      ocsfMeta     `json:"metadata"`
	Actor         *ocsfActor   `json:"actor,omitempty"`
	User          *ocsfUser    `json:"user,omitempty"`
	API           *ocsfAPICall `json:"api,omitempty"`
	HTTP          *ocsfRequest `json:"http_request,omitempty"`
	Query         *ocsfQuery   `json:"query,omitempty"`
	Src           *ocsfPlace   `json:"src_endpoint,omitempty"`
	Dst           *ocsfPlace   `json:"dst_endpoint,omitempty"`
	Traffic       *ocsfTraffic `json:"traffic,omitempty"`
	Policy        *ocsfPolicy  `json:"policy,omitempty"`
	// Unmapped holds what the schema has no place for.
	Unmapped map[string]any `json:"unmapped"`
}

type ocsfMeta struct {
	Version  string      `json:"version"`
	Product  ocsfProduct `json:"product"`
	Profiles []string    `json:"profiles"`
	UID      string      `json:"uid"`
	Sequence uint64      `json:"sequence"`
	Trace    string      `json:"correlation_uid,omitempty"`
}

type ocsfProduct struct {
	Name   string `json:"name"`
	Vendor string `json:"vendor_name"`
}

type ocsfUser struct {
	UID  string `json:"uid"`
	Type int    `json:"type_id"`
}

type ocsfActor struct {
	User ocsfUser `json:"user"`
}

type ocsfAPICall struct {
	Operation string `json:"operation"`
}

type ocsfRequest struct {
	Method string  `json:"http_method,omitempty"`
	URL    ocsfURL `json:"url"`
}

type ocsfURL struct {
	Path string `json:"path,omitempty"`
}

type ocsfQuery struct {
	Hostname string `json:"hostname"`
}

type ocsfPlace struct {
	UID      string `json:"uid,omitempty"`
	Hostname string `json:"hostname,omitempty"`
	IP       string `json:"ip,omitempty"`
	Port     uint16 `json:"port,omitempty"`
}

type ocsfTraffic struct {
	In  int64 `json:"bytes_in"`
	Out int64 `json:"bytes_out"`
}

type ocsfPolicy struct {
	UID string `json:"uid"`
}

// ocsfMethods are the activities of class 4002.
var ocsfMethods = map[string]int{"CONNECT": 1, "DELETE": 2, "GET": 3, "HEAD": 4, "OPTIONS": 5, "POST": 6, "PUT": 7, "TRACE": 8}

const ocsfOther = 99

// ocsfClass says which event a record is.
func ocsfClass(r *Record) (class, activity int) {
	switch r.Kind {
	case KindAttest:
		return ocsfAuthentication, 1
	case KindTLS:
		return ocsfAuthentication, 1
	case KindIssue:
		return ocsfAPI, 1
	case KindPolicy:
		return ocsfAPI, 3
	case KindAdmin, KindGap, KindRemoved, KindArchive:
		return ocsfAPI, ocsfOther
	case KindName:
		return ocsfDNS, 2
	case KindEgressOpen:
		return ocsfNetwork, 1
	case KindEgressClose:
		return ocsfNetwork, 2
	case KindDecision, KindError, KindRollup, KindShadow:
	}
	switch {
	case r.Detail == "handshakes":
		return ocsfAuthentication, 1
	case r.Dir == "out" && r.Reason == "resolve":
		return ocsfDNS, 2
	case r.Dir == "out" && r.Decision == Deny:
		return ocsfNetwork, 5
	case r.Dir == "out":
		return ocsfNetwork, 1
	}
	if a, ok := ocsfMethods[r.Verb]; ok {
		return ocsfHTTP, a
	}
	return ocsfHTTP, ocsfOther
}

// OCSF returns a record as one event of the Open Cybersecurity Schema Framework,
// in one line of JSON with a line feed.
func OCSF(r *Record) ([]byte, error) {
	e := ocsfEvent{
		Time: r.Time.UnixMilli(), Count: r.Count, Duration: r.Duration.Milliseconds(), SeverityID: 1, StatusID: 1,
		StatusCode: r.Class, StatusDetail: r.Reason, Message: r.Detail,
		Metadata: ocsfMeta{
			Version: ocsfVersion, Product: ocsfProduct{Name: "Sallyport", Vendor: "Sallyport"},
			Profiles: []string{"security_control"}, UID: r.ID, Sequence: r.Seq, Trace: r.Trace,
		},
		Unmapped: map[string]any{"kind": r.Kind},
	}
	e.ClassUID, e.ActivityID = ocsfClass(r)
	e.CategoryUID, e.TypeUID = e.ClassUID/1000, e.ClassUID*100+e.ActivityID
	switch r.Decision {
	case Allow:
		e.ActionID, e.DispositionID = 1, 1
	case Deny:
		e.ActionID, e.DispositionID, e.StatusID, e.SeverityID = 2, 2, 2, 2
	}
	if r.Kind == KindError || r.Kind == KindGap {
		e.StatusID, e.SeverityID = 2, 3
	}
	if !r.From.IsZero() {
		e.StartTime, e.EndTime = r.From.UnixMilli(), e.Time
	}
	e.places(r)
	if r.Rule != "" {
		e.Policy = &ocsfPolicy{r.Rule}
	}
	if r.Revision != 0 {
		e.Unmapped["policy_revision"] = r.Revision
	}
	if r.Total != 0 {
		e.Unmapped["total"] = r.Total
	}
	b, err := json.Marshal(e)
	return append(b, '\n'), err
}

// places fills in who, whereto and what.
func (e *ocsfEvent) places(r *Record) {
	const system = 3 // a type of user
	if r.Src != "" {
		e.Actor = &ocsfActor{ocsfUser{r.Src, system}}
	}
	if r.Src != "" || r.Peer != "" {
		e.Src = &ocsfPlace{UID: r.Src, IP: r.Peer}
		if i := strings.LastIndexByte(r.Peer, ':'); i > 0 {
			e.Src.IP = strings.Trim(r.Peer[:i], "[]")
		}
	}
	if r.Dst != "" {
		e.Dst = &ocsfPlace{UID: r.Dst, Port: r.Port}
		if host, ok := strings.CutPrefix(r.Dst, "host:"); ok {
			e.Dst.UID, e.Dst.Hostname = "", host
		}
	}
	switch e.ClassUID {
	case ocsfAuthentication:
		e.User = &ocsfUser{r.Src, system}
	case ocsfHTTP:
		e.HTTP = &ocsfRequest{Method: r.Verb, URL: ocsfURL{r.Path}}
	case ocsfDNS:
		e.Query = &ocsfQuery{strings.TrimPrefix(r.Dst, "host:")}
	case ocsfAPI:
		e.API = &ocsfAPICall{string(r.Kind)}
		if r.Verb != "" {
			e.API.Operation = r.Verb
		}
	}
	if r.BytesUp != 0 || r.BytesDown != 0 {
		e.Traffic = &ocsfTraffic{In: r.BytesDown, Out: r.BytesUp}
	}
}
