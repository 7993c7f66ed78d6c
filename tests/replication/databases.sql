alter database app set app.tenant = 'blue';
alter role app in database app set search_path = "a b", public;
revoke connect on database app from public;
grant connect on database app to app, expired;
comment on database app is 'where it''s at';
